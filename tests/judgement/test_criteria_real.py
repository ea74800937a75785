"""Criteria on the real model, whose states have massive channels and massive tokens."""

import json
from itertools import islice

import pytest

import shallower as sh
from shallower.judgement.criteria import criteria
from shallower.studies import demo
from tests.judgement.toy import make_subject

pytestmark = pytest.mark.slow  # the same twins tell by day of small models


def test_blocks_of_eight_on_c4(data):
    """Exhaustive search by the loss finds [12, 20) on held-out text, the distances [11, 19)."""
    with (data / "text" / "c4.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 64)]
    model, tokenizer = sh.load_model(demo.model_path(), dtype="bfloat16")
    subject = make_subject(model, tokenizer, texts)
    starts = {
        name: criteria[name].costs(subject).best_block(8).start
        for name in ("angular", "cosine", "relative_l2", "linear_map", "reachable")
    }
    assert [starts[name] for name in ("angular", "cosine", "relative_l2")] == [11, 11, 11]
    assert starts["linear_map"] in (11, 12)
    assert starts["reachable"] in (11, 12)
