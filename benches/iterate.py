"""Cut, patch, look again: what it buys against one cut and one patch of as many layers.

    python benches/iterate.py [--sizes 4,8,12] [--steps 1,2,4] [--patch quick,full,kept]
        [--fit 96] [--choose 16] [--items N] [--tokens 131072] [--cache FOLDER] [--json FILE]

On SmolLM2-135M: the plan that is verified at once, and that of iterating by each step, each after
the quick patch, after `sh.patch` (`full`, fitted anew at the end), and after `sh.patch` at every
step, kept from one to the next (`kept`). Losses are of texts that neither fit nor choose;
differences to the plan at once are paired by text. What is iterated is asserted first: every step
holds the one before it, and one step of all layers is the verified plan.
"""

import argparse
import copy
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

import shallower as sh
from patches import LENGTH, judged, read_texts
from shallower.judgement.iterating import iterate
from shallower.judgement.judges.judge import judged_batches
from shallower.judgement.judges.loss import LossJudge
from shallower.judgement.splits import three_splits
from shallower.judgement.verifying import verifier_of
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.runs import demo
from shallower.runs.cache import Cache
from shallower.runs.contestants import ModelStore, digest
from shallower.values.layers import ranges
from shallower.values.tokens import Tokens


class Bench:
    """A model, its verifier, and the texts that report."""

    def __init__(self, options):
        self.options = options
        self.model, self.tokenizer = sh.load_model(
            options.model or demo.model_path(), dtype=options.dtype
        )
        self.texts, report = read_texts(options.texts), read_texts(options.eval_texts)
        calibration = self.texts[: options.fit + options.choose]
        splits = three_splits(calibration, report, num_choosing=options.choose)
        told = {"model": str(options.model), "dtype": options.dtype}
        self.verifier = verifier_of(
            Decoder.of(self.model), self.tokenizer, splits,
            store=ModelStore(Cache(options.cache), told, []),
            texts=digest(splits.fit, splits.choose, LENGTH), tokens=Tokens(LENGTH, 8),
            top=options.top, progress=False,
        )  # fmt: skip
        batches = judged_batches(self.tokenizer, splits.report[: options.items], Tokens(LENGTH, 16))
        self.judge = LossJudge(batches)
        self.whole = self.judged()
        self._known = {}

    @torch.no_grad()
    def judged(self, plan=None):
        layers = None if plan is None else plan.survivors
        return judged(self.verifier.trials.model, self.judge, layers)

    def plans(self, n):
        """The verified plans by name, and the work of each."""
        found = {"once": [self.verifier.verify(n)]}
        for step in self.options.steps:
            if step < n:
                found[f"by {step}"] = list(iterate(self.verifier, n, step=step))
        return found

    def check(self):
        """Assert what a plan by steps is, on the smallest size."""
        n = min(self.options.sizes)
        (whole,) = iterate(self.verifier, n, step=n)
        assert whole.plan.dropped == self.verifier.verify(n).plan.dropped
        few = min(self.options.steps)
        steps = iterate(self.verifier, n, step=few)
        assert [step.n for step in steps] == [*range(few, n, few), n]
        for one, other in pairwise(steps):
            assert set(one.plan.dropped) < set(other.plan.dropped)

    def after(self, kind, steps):
        """The scores of the last plan after a patch, and the seconds of the patch."""
        plan = steps[-1].plan
        key = kind, tuple(step.plan.dropped for step in steps) if kind == "kept" else plan.dropped
        if key not in self._known:
            started = time.perf_counter()
            if kind == "quick":
                with self.verifier.patch.patched(plan):
                    seconds = time.perf_counter() - started
                    self._known[key] = self.judged(plan), seconds
            else:
                done = [plan] if kind == "full" else [step.plan for step in steps]
                model = self.patched(done)
                seconds = time.perf_counter() - started
                with torch.no_grad():
                    self._known[key] = judged(Layerwise(model), self.judge), seconds
        return self._known[key]

    def patched(self, plans):
        """A copy that was cut and patched plan after plan, each holding the one before it."""
        model, gone = copy.deepcopy(self.model), set()
        for plan in plans:
            left = [layer for layer in range(plan.num_layers) if layer not in gone]
            now = [left.index(layer) for layer in plan.dropped if layer not in gone]
            sh.patch(
                model, self.tokenizer, now, texts=self.texts, max_length=LENGTH,
                num_tokens=self.options.tokens, progress=False,
            )  # fmt: skip
            gone |= set(plan.dropped)
        return model


def measure(bench, n):
    """The rows of one size, as they are found."""
    plans = bench.plans(n)
    for name, steps in plans.items():
        last = steps[-1]
        cut, once = bench.judged(last.plan), plans["once"]
        base = {
            "n": n, "name": name, "dropped": list(last.plan.dropped), "whole": bench.whole.mean,
            "cut": cut.mean, "chosen_by": last.candidates[0].score,
            "layer_forwards": sum(step.layer_forwards for step in steps),
            "seconds": sum(step.seconds for step in steps),
            "again": [name for step in steps for name in step.candidates[0].proposed_by
                      if name.endswith(" again")],
        }  # fmt: skip
        for kind in bench.options.patch:
            if kind == "kept" and name == "once":
                continue
            try:
                scores, seconds = bench.after(kind, steps)
            except sh.PatchError as error:
                print(f"n = {n} {name} {kind}: {error}", file=sys.stderr)
                continue
            row = {**base, "patch": kind, "loss": scores.mean, "stderr": scores.stderr}
            row["patch_seconds"] = seconds
            if name != "once":
                ours = bench.after("full" if kind == "kept" else kind, once)[0]
                row["difference"] = scores.minus(ours).to_json()
            yield row


def line(row):
    less = ""
    if "difference" in row:
        less = f"{row['difference']['mean']:+.3f} ± {row['difference']['stderr']:.3f}"
    return (
        f"n = {row['n']:<3} {row['name']:<6} {row['patch']:<6} {row['loss']:.3f} ± "
        f"{row['stderr']:.3f} {less:<16} cut {row['cut']:.3f} layer-forwards "
        f"{row['layer_forwards']:>7} {row['seconds']:6.0f} s, patch {row['patch_seconds']:5.0f} s "
        f"{ranges(row['dropped'])}"
    )


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def numbers(text):
        return [int(part) for part in text.split(",")]

    parser.add_argument("--model", help="another model than SmolLM2-135M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--texts", type=Path, default=data / "text" / "c4.jsonl")
    parser.add_argument("--eval-texts", type=Path, default=data / "text" / "c4_eval.jsonl")
    parser.add_argument("--sizes", type=numbers, default=[4, 8, 12])
    parser.add_argument("--steps", type=numbers, default=[1, 2, 4])
    parser.add_argument("--patch", type=lambda text: text.split(","), default=["quick", "full"])
    parser.add_argument("--fit", type=int, default=96, help="texts that fit while plans are made")
    parser.add_argument("--choose", type=int, default=16)
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--items", type=int, help="the first so many texts report; all by default")
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens of a full patch")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="of a run that was cut short")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows, as they are found"
    )
    options = parser.parse_args()
    if unknown := set(options.patch) - {"quick", "full", "kept"}:
        sys.exit(f"--patch: no {', '.join(sorted(unknown))}; there are quick, full, kept")
    return options


def main():
    options = parse()
    bench = Bench(options)
    bench.check()
    rows = []
    for n in options.sizes:
        for row in measure(bench, n):
            rows.append(row)
            print(line(row), flush=True, file=sys.stderr)
            if options.json:
                command = " ".join(["python", "benches/iterate.py", *sys.argv[1:]])
                record = {"command": command, "dtype": options.dtype, "rows": rows}
                options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
