"""What criteria of similarity, of maps and of weights say of SmolLM2-135M, and what they take.

    python benches/criteria.py [--texts c4.jsonl] [--count 64] [--criteria NAME ...]

In bfloat16, on texts of 256 tokens at most. A line of JSON for each criterion: what it costs by
itself, shared passes included; the costs of single layers; the best block of 1, 2, 4, 8 and 12
layers, or for criteria of single layers the layers that go first.
"""

import argparse
import json
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np

import shallower as sh
from shallower.judgement.criteria import criteria
from shallower.judgement.judges.judge import LossJudge
from shallower.judgement.subject import Subject
from shallower.judgement.trials import Trials
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.studies import demo
from shallower.texts.batches import TokenBatches
from shallower.values.tokens import Tokens

SIZES = (1, 2, 4, 8, 12)
NAMES = [
    "angular", "cosine", "relative_l2", "cka", "linear_map", "reachable", "block_influence",
    "magnitude", "xmerge", "taylor", "weights",
]  # fmt: skip


def read_subject(file, count):
    """The model and the texts that fit; none chooses."""
    model, tokenizer = sh.load_model(demo.model_path(), dtype="bfloat16")
    with file.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, count)]
    read = TokenBatches(tokenizer, texts, Tokens(256, 8), min_tokens=2)
    batches, decoder = list(read), Decoder.of(model)
    trials = Trials(Layerwise(decoder), LossJudge(batches[:1]))
    return Subject(decoder, batches, trials, SIZES, (read.identity,))


def measure(subject, name):
    """What a criterion says, and its work."""
    started = time.perf_counter()
    with subject.counting():
        costs = criteria[name].costs(subject)
    seconds = time.perf_counter() - started
    if costs.of_single_layers:
        found = {"order": np.argsort(np.diag(costs.blocks, 1), kind="stable")[: SIZES[-1]].tolist()}
    else:
        found = {"starts": {n: costs.best_block(n).start for n in SIZES}}
    return {
        "criterion": name,
        "seconds": round(seconds, 1),
        "layer_forwards": subject.ran,
        **found,
        "single_layers": [
            None if np.isnan(cost) else float(f"{cost:.4g}") for cost in np.diag(costs.blocks, 1)
        ],
    }


def main():
    parser = argparse.ArgumentParser()
    folder = Path(os.environ.get("SHALLOWER_DATA", "."))
    parser.add_argument("--texts", type=Path, default=folder / "text" / "c4.jsonl")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--criteria", nargs="+", choices=NAMES, default=NAMES)
    arguments = parser.parse_args()
    subject = read_subject(arguments.texts, arguments.count)
    for name in arguments.criteria:
        print(json.dumps(measure(subject, name)), flush=True)


if __name__ == "__main__":
    main()
