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
from tests.judgement.published import BLOCK_INFLUENCE, L_STAR
from tests.judgement.toy import make_subject

NUM_TEXTS = 256


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
