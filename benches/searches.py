"""What searches by the loss find and take: from shared states and raced, beside plain ones.

    python benches/searches.py [--texts c4_eval.jsonl] [--items 12] [--json] [--journal FILE]

The first tokens of the texts, joined by the end-of-text token, are cut into items of 256 for
SmolLM2-135M in bfloat16. The blocks of 1, 2, 4, 8 and 12 layers and the set of greedy removal are
those that were found on another machine; on the way to that set two layers are so near one another
that kernels decide. Each search is done on all items and then raced. A plain search runs every
candidate from the embedding on.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

import shallower as sh
from shallower.judgement.criteria.searches import Exhaustive, Greedy
from shallower.judgement.judges.judge import LossJudge, looks
from shallower.judgement.subject import Subject
from shallower.judgement.trials import Trials
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.store.store import Journal
from shallower.studies import demo
from shallower.texts.batches import Batch
from shallower.values.layers import ranges

STARTS = {1: (14, 4.248), 2: (17, 4.365), 4: (16, 4.592), 8: (12, 5.100), 12: (9, 6.287)}
GREEDY = (14, 17, 13, 15, 12, 16, 18, 5)
GREEDY_LOSS = 4.965
NEAR = 0.02
"""Nats between machines."""


class WholeExhaustive(Exhaustive):
    alpha = 0.0


class WholeGreedy(Greedy):
    alpha = 0.0


def packed(tokenizer, file, count, length=256):
    """Items of tokens, from texts that follow one another."""
    ids = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * length:
            break
    items = np.array(ids[: count * length]).reshape(count, length)
    return [
        Batch(items[part], np.ones_like(items[part]), np.arange(part.start, part.stop))
        for part in looks(count, 8)
    ]


def plain_forwards(name, num_layers, n, texts):
    """Layers that run where each candidate starts from the embedding."""
    if name == "exhaustive":
        return (num_layers - n + 1) * (num_layers - n) * texts
    return sum((num_layers - k) * (num_layers - k - 1) for k in range(n)) * texts


def measure(subject, criterion, n):
    subject.sizes = (n,)
    started = time.perf_counter()
    with subject.trials.counted() as count:
        plan = criterion.plans(subject)[n]
    return plan.dropped, count.layer_forwards, time.perf_counter() - started


def compare(subject, whole, raced, n):
    texts = subject.trials.judge.num_items
    found, cached, cached_seconds = measure(subject, whole, n)
    winner, race, raced_seconds = measure(subject, raced, n)
    scores = subject.trials.scores(found)
    difference = subject.trials.scores(winner).minus(scores)
    plain = plain_forwards(raced.name, subject.num_layers, n, texts)
    return {
        "search": raced.name, "n": n, "dropped": found, "loss": scores.mean,
        "raced": winner, "raced_difference": difference.mean, "raced_tied": difference.tied,
        "plain_forwards": plain, "cached_forwards": cached,
        "raced_forwards": race, "cached_ratio": cached / plain,
        "raced_ratio": race / plain, "cached_seconds": cached_seconds,
        "raced_seconds": raced_seconds,
    }  # fmt: skip


def check(row):
    """The answers of another machine, and what a search may take."""
    if row["search"] == "exhaustive":
        start, loss = STARTS[row["n"]]
        assert row["dropped"] == tuple(range(start, start + row["n"])), row
        assert abs(row["loss"] - loss) < NEAR, row
    elif row["n"] == len(GREEDY):
        assert row["dropped"] == tuple(sorted(GREEDY)) or row["loss"] < GREEDY_LOSS + NEAR, row
    assert row["raced"] == row["dropped"] or row["raced_tied"], row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--texts", type=Path, default=data / "text" / "c4_eval.jsonl")
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--sizes", default="8,4,2,1,12")
    parser.add_argument("--greedy", type=int, default=len(GREEDY))
    parser.add_argument("--journal", type=Path, help="trials of a run that was cut short")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model, tokenizer = sh.load_model(demo.model_path(), dtype="bfloat16")
    judge = LossJudge(packed(tokenizer, options.texts, options.items))
    journal = Journal(options.journal, "remove it") if options.journal else None
    trials = Trials(Layerwise(model), judge, journal=journal)
    subject = Subject(Decoder.of(model), (), trials, ())
    searches = [(WholeExhaustive(), Exhaustive(), n) for n in map(int, options.sizes.split(","))]
    if options.greedy:
        searches.append((WholeGreedy(), Greedy(), options.greedy))
    rows = []
    for whole, raced, n in searches:
        rows.append(compare(subject, whole, raced, n))
        print(
            f"{raced.name} n = {n}: {ranges(rows[-1]['dropped'])} "
            f"{rows[-1]['loss']:.3f}, "
            f"layer-forwards plain {rows[-1]['plain_forwards']}, "
            f"cached {rows[-1]['cached_ratio']:.3f} of them in {rows[-1]['cached_seconds']:.0f} s, "
            f"raced {rows[-1]['raced_ratio']:.3f} in {rows[-1]['raced_seconds']:.0f} s",
            file=sys.stderr,
        )
        if options.texts.name == "c4_eval.jsonl" and options.items == 12:
            check(rows[-1])
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
