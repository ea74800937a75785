"""What papers have chosen, against what the criteria choose.

Where SHALLOWER_MODELS names a folder of models by their hub names and SHALLOWER_DATA one of texts:

    SHALLOWER_MODELS=… SHALLOWER_DATA=… python -m pytest tests/judgement/test_criteria_published.py

The papers' texts and weights (4 bits) are not quite ours, so neighbours count as the same.
"""

import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import shallower as sh
from shallower.judgement.criteria import criteria
from tests.judgement.toy import make_subject

NUM_TEXTS = 256

L_STAR = {
    "Llama-2-7b-hf": (32, [
        23, 24, 23, 23, 23, 22, 22, 21, 20, 19, 18, 18, 17, 16, 15, 8, 8, 7, 4, 4, 4, 2, 2, 2,
    ]),
    "Llama-2-13b-hf": (40, [
        33, 32, 31, 30, 29, 28, 27, 27, 27, 26, 25, 24, 24, 23, 22, 22, 20, 19, 18, 18, 17, 17, 15,
        3, 3, 3, 3, 3, 3, 3, 3, 3,
    ]),
    "Mistral-7B-v0.1": (32, [
        26, 24, 23, 23, 23, 22, 21, 21, 20, 20, 19, 17, 17, 16, 13, 13, 11, 8, 8, 6, 6, 5, 4, 3,
    ]),
    "Llama-2-70b-hf": (80, [
        62, 62, 61, 62, 61, 60, 61, 58, 59, 58, 58, 57, 56, 55, 54, 53, 53, 53, 53, 53, 51, 50, 49,
        50, 49, 49, 48, 48, 46, 46, 45, 44, 43, 42, 41, 40, 39, 37, 35, 35, 33, 33, 29, 30, 29, 28,
        28, 28, 26, 25, 23, 22, 22, 21, 20, 19, 19, 18, 16, 16, 14, 14, 13, 10,
    ]),
}  # fmt: skip
"""Layers of a model, and the first layer of the best block of n = 1, 2, … by ``angular``:
2403.17887, 10,000 samples of C4's validation split, 4 bits."""

BLOCK_INFLUENCE = {
    "Llama-2-7b-hf": (32, [27, 26, 25, 28, 24, 29, 23, 21, 22]),
    "Llama-2-13b-hf": (40, [33, 31, 32, 30, 29, 34, 28, 35, 27, 26]),
}
"""Layers of a model, and the order in which ``block_influence`` drops them (2403.03853)."""


def published_subject(name, data):
    path = Path(os.environ.get("SHALLOWER_MODELS", "/nowhere")) / name
    if not path.is_dir():
        pytest.skip(f"no model at {path}: set SHALLOWER_MODELS")
    model, tokenizer = sh.load_model(path)
    with (data / "text" / "c4.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, NUM_TEXTS)]
    return make_subject(model, tokenizer, texts, max_length=2048, batch_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", L_STAR)
def test_the_papers_blocks(name, data):
    costs = criteria["angular"].costs(published_subject(name, data))
    starts = L_STAR[name][1]
    found = [costs.best_block(n).start for n in range(1, len(starts) + 1)]
    assert np.median(np.abs(np.subtract(found, starts))) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCK_INFLUENCE)
def test_shortgpts_orders(name, data):
    costs = criteria["block_influence"].costs(published_subject(name, data))
    order = BLOCK_INFLUENCE[name][1]
    assert len(set(costs.cheapest(len(order)).dropped) & set(order)) >= len(order) - 1
