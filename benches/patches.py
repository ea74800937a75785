"""Patches of SmolLM2-135M and what other tools put at a cut: what each brings back of the loss.

    python benches/patches.py [--cuts 12:20,13:17,11:19] [--tokens 131072] [--texts c4.jsonl]
        [--eval-texts c4_eval.jsonl] [--methods NAME,...] [--json FILE]

All fit on the same tokens of the same texts, of 256 tokens at most; those with `_128` on 37,000
tokens of texts of 128, and `quick` on 8,192. Texts that report have no part in a fit. A share that
came back is (cut - patched) / (cut - whole), with its error over texts; the column behind it is by
how much that of `refit` is more, paired. The operators are those of `peer_operators`, checked
against NumPy first. Times of operators hold the forward up to the end of the block; our own, all
that `sh.patch` does.

`--windows FILE` reports on windows of 256 tokens of a text file beside it; `--folder 12:20=FOLDER`
on a checkpoint of ours of that cut, as one that was healed.
"""

import argparse
import copy
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import shallower as sh
from peer_checks import check
from peer_operators import collect
from shallower.judgement.judges.judge import LossJudge, judged_batches, looks
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.models.residual_writers import find_writers
from shallower.patching.checkpoint import Changes
from shallower.patching.quick import QuickPatch
from shallower.patching.states import divide
from shallower.results.scores import Scores
from shallower.studies import demo
from shallower.texts.batches import Batch
from shallower.values.tokens import Tokens

LENGTH = 256
QUICK_TOKENS = 8192
RECIPE = 128, 37_000
"""Tokens of a text, and of all, in the figures of Ghosted Layers' operator in docs/peers.md."""


@dataclass
class Setting:
    """A model, the texts that fit, and the judges of those that report, by name."""

    model: torch.nn.Module
    tokenizer: object
    texts: list
    tokens: int
    judges: dict
    rows: list = field(default_factory=list)

    def __post_init__(self):
        self.layerwise = Layerwise(self.model)
        self.fitted, self.held = divide(
            self.tokenizer, self.texts, tokens=Tokens(LENGTH, 16), num_tokens=self.tokens
        )
        with torch.no_grad():
            self.whole = {
                name: judged(self.layerwise, judge) for name, judge in self.judges.items()
            }


@torch.no_grad()
def judged(model, judge, layers=None, *, at=None, operator=None):
    """The scores of a cut; an operator maps the states behind layer ``at``."""
    sums = np.full(judge.num_items, np.nan)
    layers = range(len(model)) if layers is None else layers
    for index, batch in enumerate(judge.batches):
        states = model.embed(batch)
        if operator is None:
            states = model.run(batch, states, layers)
        else:
            states = model.run(batch, states, [layer for layer in layers if layer <= at])
            states = operator(states)
            states = model.run(batch, states, [layer for layer in layers if layer > at])
        with model.starting_from(states, ()):
            sums[judge.items[index]] = judge.measure(model.head, index)
    return Scores(sums, judge.weights)


def linear(matrix):
    """The operator x W, in float32."""
    matrix = matrix.float()
    return lambda states: (states.float() @ matrix).to(states.dtype)


class Cut:
    """One block, and what every method makes of it."""

    def __init__(self, setting, start, stop):
        self.setting, self.start, self.stop = setting, start, stop
        self.plan = sh.Plan.of(len(setting.layerwise), [range(start, stop)])
        self.scores = {"cut": self._judged()}
        self.width = setting.model.get_input_embeddings().weight.shape[1]
        self._collected = {}

    def _judged(self, operator=None):
        """The scores of the cut by the name of the texts."""
        at = self.start - 1
        return {
            name: judged(
                self.setting.layerwise, judge, self.plan.survivors, at=at, operator=operator
            )
            for name, judge in self.setting.judges.items()
        }

    def sums(self, name):
        """The sums over the texts that fit, those held out, or those of the other recipe."""
        if name not in self._collected:
            batches = {"fitted": self.setting.fitted, "held": self.setting.held}.get(name)
            if batches is None:
                length, tokens = RECIPE
                tokens = min(tokens, self.setting.tokens)
                batches, _ = divide(
                    self.setting.tokenizer, self.setting.texts, tokens=Tokens(length, 16),
                    num_tokens=tokens,
                )  # fmt: skip
            self._collected[name] = collect(self.setting.layerwise, batches, self.start, self.stop)
        return self._collected[name]

    def ours(self):
        """A patch of a copy of the model, by the public function."""
        setting, model = self.setting, copy.deepcopy(self.setting.model)
        started = time.perf_counter()
        done = sh.patch(
            model, setting.tokenizer, self.plan, texts=setting.texts,
            max_length=LENGTH, num_tokens=setting.tokens, progress=False,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        patched = Layerwise(model)
        scores = {name: judged(patched, judge) for name, judge in setting.judges.items()}
        return scores, seconds, done.num_tokens

    def quick(self):
        """The patch that races use, on few tokens."""
        batches, tokens = [], 0
        for batch in judged_batches(self.setting.tokenizer, self.setting.texts, Tokens(LENGTH, 8)):
            if tokens >= min(QUICK_TOKENS, self.setting.tokens):
                break
            batches.append(batch)
            tokens += int(batch.attention_mask.sum())
        started = time.perf_counter()
        with QuickPatch(self.setting.layerwise, batches).patched(self.plan):
            seconds = time.perf_counter() - started
            return self._judged(), seconds, tokens

    def theirs(self, method):
        """An operator of another tool."""
        name = "recipe" if method.endswith("_128") else "fitted"
        sums = self.sums(name)
        held = self.sums("held") if method.endswith("_chosen") else None
        family = next(f for f in sums.seconds if method.startswith(f))
        started = time.perf_counter()
        if family == "ghosted":
            operator = linear(sums.ghosted(first="inner" not in method, held=held))
        elif family == "linear_patch":
            operator = linear(sums.linear_patch())
        elif family == "prune_comp":
            factor = sums.prune_comp()
            operator = lambda states: (states.float() * factor).to(states.dtype)  # noqa: E731
        else:
            turn = sums.replaceme(first="inner" not in method, held=held)
        seconds = time.perf_counter() - started + sums.seconds["forward"] + sums.seconds[family]
        if held is not None:
            seconds += held.seconds["forward"] + held.seconds[family]
        scores = self._fused(turn) if family == "replaceme" else self._judged(operator)
        return scores, seconds, sums.tokens

    @torch.no_grad()
    def _fused(self, turn):
        """ReplaceMe's map in the matrix that writes what the map is of."""
        model, batch = self.setting.layerwise, self.setting.held[0].split(1)[0]
        states = model.run(batch, model.embed(batch), range(self.start - 1))
        writer = find_writers(model, self.start - 1, batch=batch, states=states).feed_forward
        changes = Changes()
        try:
            changes.set(writer, turn.T @ writer.weight.double())
            return self._judged()
        finally:
            changes.undo()

    def measure(self, method):
        """Measure a method; a row for every set of texts that report."""
        if method == "refit":
            scores, seconds, tokens = self.ours()
        elif method == "quick":
            scores, seconds, tokens = self.quick()
        else:
            scores, seconds, tokens = self.theirs(method)
        adds = method.startswith(("ghosted", "linear_patch"))
        self.told(method, scores, seconds=seconds, tokens=tokens, adds=self.width**2 * adds)

    def told(self, method, scores, **more):
        """Note and print what a method has brought back."""
        self.scores[method] = scores
        for name, found in scores.items():
            whole, cut = self.setting.whole[name], self.scores["cut"][name]
            lost = cut.sums - whole.sums
            back = Scores(cut.sums - found.sums, lost)
            row = {
                "cut": [self.start, self.stop], "texts": name, "method": method,
                "whole": whole.mean, "cut_loss": cut.mean, "loss": found.mean,
                "stderr": found.stderr, "recovered": back.mean, "recovered_stderr": back.stderr,
                "added_parameters": more.get("adds", 0), "stock": not more.get("adds", 0),
                "seconds": more.get("seconds"), "tokens": more.get("tokens"),
            }  # fmt: skip
            if method != "refit" and "refit" in self.scores:
                ours = self.scores["refit"][name]
                less = Scores(found.sums - ours.sums, lost)
                row |= {"less": less.mean, "less_stderr": less.stderr}
                row["nats_more"] = found.minus(ours).to_json()
            self.setting.rows.append(row)
            print(line(row), flush=True, file=sys.stderr)


METHODS = (
    "refit", "quick", "ghosted", "ghosted_inner", "ghosted_chosen",
    "ghosted_inner_chosen", "ghosted_128", "ghosted_inner_128", "replaceme", "replaceme_inner",
    "replaceme_chosen", "linear_patch", "prune_comp",
)  # fmt: skip
"""`inner` leaves the first tokens out of the fit; `chosen` chooses the ridge on held-out states."""


def line(row):
    seconds = "" if row["seconds"] is None else f"{row['seconds']:7.1f} s"
    back = f"{100 * row['recovered']:6.1f} ± {100 * row['recovered_stderr']:3.1f} %"
    less = f"{100 * row['less']:+6.1f} ± {100 * row['less_stderr']:.1f}" if "less" in row else ""
    start, stop = row["cut"]
    return (
        f"[{start}, {stop}) {row['texts']:<14} {row['method']:<22} {row['loss']:7.3f} "
        f"± {row['stderr']:.3f} {back} {less:<14} {seconds} {row['added_parameters']:>8}"
    )


def read_texts(file, count=None):
    with file.open(encoding="utf-8") as lines:
        texts = [json.loads(one)["text"] for one in lines]
    return texts[:count]


def windows(tokenizer, file, count):
    """Evenly spaced windows of a text, whatever documents they run across."""
    ids = np.array(tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    all_of_them = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    wanted = np.linspace(0, len(all_of_them) - 1, min(count, len(all_of_them))).round().astype(int)
    chosen = all_of_them[wanted]
    return [
        Batch(chosen[part], np.ones_like(chosen[part]), np.arange(part.start, part.stop))
        for part in looks(len(chosen), 16)
    ]


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--model", help="another model than SmolLM2-135M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--texts", type=Path, default=data / "text" / "c4.jsonl")
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens to fit")
    parser.add_argument("--eval-texts", type=Path, default=data / "text" / "c4_eval.jsonl")
    parser.add_argument("--items", type=int, help="the first so many texts report; all by default")
    parser.add_argument("--windows", type=Path, metavar="FILE", help="a text file that reports too")
    parser.add_argument("--num-windows", type=int, default=160)
    parser.add_argument("--cuts", default="12:20,13:17,11:19")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--folder", action="append", default=[], metavar="START:STOP=FOLDER")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows, as they are found"
    )
    return parser.parse_args()


def main():
    options = parse()
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        sys.exit(f"--methods: no {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    check()
    model, tokenizer = sh.load_model(options.model or demo.model_path(), dtype=options.dtype)
    report = read_texts(options.eval_texts, options.items)
    judges = {
        options.eval_texts.stem: LossJudge(judged_batches(tokenizer, report, Tokens(LENGTH, 16)))
    }
    if options.windows:
        batches = windows(tokenizer, options.windows, options.num_windows)
        judges[options.windows.stem] = LossJudge(batches)
    setting = Setting(model, tokenizer, read_texts(options.texts), options.tokens, judges)
    healed = [one.split("=", 1) for one in options.folder]
    for block in options.cuts.split(","):
        cut = Cut(setting, *map(int, block.split(":")))
        for method in methods:
            try:
                cut.measure(method)
            except sh.PatchError as error:
                print(f"{block} {method}: {error}", file=sys.stderr)
                continue
            write(options, setting)
        for place in [folder for name, folder in healed if name == block]:
            given = Layerwise(Decoder.of(sh.load_model(place, dtype=options.dtype)[0]))
            found = {name: judged(given, judge) for name, judge in judges.items()}
            cut.told(Path(place).name, found)
            write(options, setting)


def write(options, setting):
    if options.json:
        command = " ".join(["python", "benches/patches.py", *sys.argv[1:]])
        record = {"command": command, "dtype": options.dtype, "rows": setting.rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
