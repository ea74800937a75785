"""What becomes of experts that the calibration texts never call: dropped first, or kept.

    python benches/unrouted_experts.py [--steps 600] [--seeds 0,1] [--texts c4.jsonl] [--json FILE]

A small Qwen3-MoE of four layers, two of which have 64 experts, 2 for a token, learns C4 and
Python's standard library, half each, with a loss that balances its experts over both. Then it is
calibrated on a few texts of one domain, and experts go by the lowest mean of g‖f‖ (REAP): those
without a token first, as in the authors' code, or last. Losses are on other texts of that domain
and of the other one; the difference of both rules, last less first, is paired by text.
"""

import argparse
import json
import os
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

import shallower as sh
from experts import config_of, tokenizer_of, trained
from patches import read_texts
from shallower.savings.timing import title_of
from shallower.values.experts import DroppedExperts
from shallower.values.provenance import versions

SPARSE, EXPERTS, BALANCE, TOKENS = (1, 2), 64, 0.01, 128
CALIBRATED, GO, REPORTING = (2, 8, 32), (16, 32, 48), 160


def library():
    """Passages of Python's standard library, of 1,500 characters."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    return [one[at : at + 1500] for one in code for at in range(0, len(one) - 1500, 1500)]


def interleaved(texts):
    """Texts that learn, calibrate and report, of all parts of the domain."""
    held = texts[::5]
    learning = [text for index, text in enumerate(texts) if index % 5]
    return learning, held[::2], held[1::2][:REPORTING]


def lowest(means, count, unseen):
    """The experts that go of each layer by the lowest mean, where none is ``unseen``."""
    keys = np.where(np.isnan(means), unseen, means)
    order = np.argsort(keys, axis=1, kind="stable")[:, :count]
    gone = {layer: row.tolist() for layer, row in zip(SPARSE, order, strict=True)}
    return DroppedExperts(EXPERTS, gone)


def losses(model, tokenizer, dropped, reports):
    """By domain, the loss without experts."""
    with sh.without_layers(model, sh.Plan(4, (), experts=dropped)):
        return {
            name: sh.evaluate_loss(model, tokenizer, texts, max_length=TOKENS, progress=False)
            for name, texts in reports.items()
        }


def rows_of(model, tokenizer, calibration, reports):
    """A row for each domain, number of calibration texts and of experts that go."""
    for domain, texts in calibration.items():
        for number in CALIBRATED:
            scanned = sh.scan(
                model, tokenizer, texts[:number], max_length=TOKENS, experts=True, progress=False
            ).experts
            means, unrouted = scanned.mean("gated"), (scanned.counts == 0).sum(axis=1)
            for count in GO:
                pair = [lowest(means, count, unseen) for unseen in (-np.inf, np.inf)]
                first, last = (losses(model, tokenizer, one, reports) for one in pair)
                row = {
                    "calibrated_on": domain, "texts": number, "unrouted": unrouted.tolist(),
                    "go": count, "first": {k: v.nats for k, v in first.items()},
                    "last": {k: v.nats for k, v in last.items()},
                }  # fmt: skip
                for name in reports:
                    less = last[name].minus(first[name])
                    row[f"last_minus_first_on_{name}"] = [less.mean, less.stderr]
                yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--texts", type=Path, default=data / "text" / "c4.jsonl")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    c4, code = (interleaved(some) for some in (read_texts(options.texts), library()))
    size = min(sum(map(len, c4[0])), sum(map(len, code[0])))
    learning = [text for one in (c4, code) for text in _until(one[0], size)]
    calibration, reports = ({"c4": c4[i], "code": code[i]} for i in (1, 2))
    tokenizer, models = tokenizer_of(learning), []
    for seed in map(int, options.seeds.split(",")):
        started = time.perf_counter()
        model, loss = trained(
            config_of(tokenizer, SPARSE, EXPERTS, BALANCE), tokenizer, learning,
            steps=options.steps, useless=(), seed=seed,
        )  # fmt: skip
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        whole = {
            name: sh.evaluate_loss(model, tokenizer, texts, max_length=TOKENS, progress=False).nats
            for name, texts in reports.items()
        }
        models.append({"seed": seed, "training_loss": loss, "whole": whole, "rows": []})
        for row in rows_of(model, tokenizer, calibration, reports):
            models[-1]["rows"].append(row)
            print(json.dumps(row), flush=True)
    if options.json:
        record = {
            "command": " ".join(["python", "benches/unrouted_experts.py", *sys.argv[1:]]),
            "machine": title_of(model.device), "versions": versions(), "models": models,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _until(texts, size):
    """The first texts, of so many characters together."""
    ends = np.cumsum([len(text) for text in texts])
    return [text for text, end in zip(texts, ends, strict=True) if end <= size]


if __name__ == "__main__":
    main()
