"""Verified plans beside the best plan of any criterion, on texts that neither has seen.

    python benches/verify.py [--texts c4.jsonl] [--eval-texts c4_eval.jsonl] [--n 1,2,4,8,12]
                             [--model MODEL] [--dtype DTYPE] [--count 165] [--out FILE]

The rivals are the rows of `sh.compare`, all criteria; the verified plans are those of `Verifier`,
judged as they are cut and after a quick patch. For every size and both ways the verified plan is
compared with the best rival text by text, on the texts that report; after a quick patch on the
texts that fit of the comparison. It is asserted that it loses no more within one paired standard
error, and that all verifications of one kind take at most a quarter of the layer-forwards of plain
exhaustive searches on as many texts.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import shallower as sh
from shallower.evaluation.loss import fitting_tokens
from shallower.judgement.judges.judge import LossJudge, judged_batches
from shallower.judgement.patched_trials import PatchedTrials
from shallower.judgement.trials import Trials
from shallower.judgement.verifying import Verifier
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.patching.quick import QuickPatch
from shallower.settings.studies import CompareSettings
from shallower.studies import demo
from shallower.texts.batches import TokenBatches
from shallower.texts.splits import three_splits
from shallower.values.layers import ranges
from shallower.values.tokens import Tokens

VERIFIED = 128
"""Calibration texts of a verification: up to 96 of them choose."""

DATA = Path(os.environ.get("SHALLOWER_DATA", "shared/data")) / "text"


def read(file, count):
    """The first texts of a file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(count), lines, strict=False)]


class NoStore:
    """A store that keeps nothing."""

    def get(self, kind, inputs):
        """Nothing was measured before."""

    def put(self, kind, inputs, value):
        """Forget it."""

    def journal(self, kind, inputs):
        """There is none."""


def reports(model, tokenizer, splits):
    """Cuts judged on the texts that report, as they are and after a quick patch."""
    decoder = Decoder.of(model)
    tokens = fitting_tokens(decoder, Tokens(256, "auto"))
    layers = Layerwise(decoder)
    trials = Trials(layers, LossJudge(judged_batches(tokenizer, splits.report, tokens)))
    batches = list(TokenBatches(tokenizer, splits.fit, tokens, min_tokens=2))
    return {"none": trials, "patch": PatchedTrials(trials, QuickPatch(layers, batches))}


def plain_work(num_layers, found):
    """Layer-forwards of a plain exhaustive search of the same size, on the same texts."""
    return (num_layers - found.n + 1) * (num_layers - found.n) * found.num_items


def duel(report, verified, rivals):
    """A verified plan and the best of the rivals, both ways, with their paired difference."""
    row = {"n": verified.n, "after": verified.after, "dropped": verified.plan.dropped,
           "layer_forwards": verified.layer_forwards, "seconds": verified.seconds,
           "said": verified.sentence()}  # fmt: skip
    for way, state in (("none", "cut"), ("patch", "patched")):
        known = [(r.standing.loss.mean, r) for r in rivals if r.state == state and r.standing]
        _, best = min(known, key=lambda one: one[0])
        ours, theirs = (report[way].scores(cut) for cut in (verified.plan.dropped, best.dropped))
        more = ours.minus(theirs)
        same = set(verified.plan.dropped) == set(best.dropped)
        row[way] = {
            "loss": ours.mean, "stderr": ours.stderr, "rival": best.criterion,
            "of_rival": best.dropped, "loss_of_rival": theirs.mean,
            "more": 0.0 if same else more.mean, "paired": 0.0 if same else more.stderr,
        }  # fmt: skip
    return row


def failures(rows, limits):
    """What does not hold."""
    for row in rows:
        found = row[row["after"]]
        if found["more"] > found["paired"]:
            yield f"n = {row['n']}, {row['after']}: {found['more']:+.4f} ± {found['paired']:.4f}"
    for after, limit in limits.items():
        work = sum(row["layer_forwards"] for row in rows if row["after"] == after)
        if work > limit:
            yield f"{after}: {work} layer-forwards of at most {limit:.0f}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=Path, default=DATA / "c4.jsonl")
    parser.add_argument("--eval-texts", type=Path, default=DATA / "c4_eval.jsonl")
    parser.add_argument("--n", default="1,2,4,8,12")
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--count", type=int, default=165)
    parser.add_argument("--after", default="none,patch")
    parser.add_argument("--max-texts", type=int, default=VERIFIED)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes = [int(n) for n in options.n.split(",")]
    source = sh.ModelSource(options.model or demo.model_path(), options.dtype)
    texts = read(options.texts, max(CompareSettings().max_texts, options.max_texts))
    held_out = read(options.eval_texts, options.count)
    compared = sh.compare(source, texts=texts, eval_texts=held_out, n=sizes,
                          max_eval_texts=options.count)  # fmt: skip
    rows, limits = [], {}
    model, tokenizer = source.load()
    report = reports(model, tokenizer, three_splits(texts[: CompareSettings().max_texts], held_out))
    splits = three_splits(texts[: options.max_texts], held_out, num_choosing=96)
    num_layers = len(report["none"].model)
    for after in options.after.split(","):
        verifier = Verifier(
            Decoder.of(model), tokenizer, splits, store=NoStore(), texts="",
            tokens=Tokens(256, "auto"), after=after,
        )  # fmt: skip
        found = {n: verifier.verify(n) for n in sizes}
        limits[after] = sum(plain_work(num_layers, one) for one in found.values()) / 4
        for n, one in found.items():
            rows.append(duel(report, one, [row for row in compared.rows if row.n == n]))
            say(rows[-1], plain_work(num_layers, one) / 4)
    failed = list(failures(rows, limits))
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "limits": limits}, indent=1) + "\n")
    print("\n".join(failed) or "holds")
    sys.exit(bool(failed))


def say(row, quarter):
    """A line for a size, and one for each way to judge it."""
    print(
        f"n = {row['n']}, after {row['after']}: {row['layer_forwards']} layer-forwards, a quarter "
        f"is {quarter:.0f}; {row['seconds']:.0f} s; {row['said']}"
    )
    for way in ("none", "patch"):
        one = row[way]
        print(
            f"  {way}: {one['loss']:.4f} beside {one['rival']} "
            f"{ranges(sorted(one['of_rival']))} {one['loss_of_rival']:.4f}: "
            f"{one['more']:+.4f} ± {one['paired']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
