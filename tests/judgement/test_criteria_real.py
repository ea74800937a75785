"""Criteria on the real model, whose states have massive channels and massive tokens."""

import json
from itertools import islice

import pytest

import shallower as sh
from shallower.judgement.criteria import criteria
from shallower.studies import demo
from tests.judgement import twins
from tests.judgement.toy import make_subject

pytestmark = pytest.mark.slow  # the same twins tell by day of small models


@pytest.fixture(scope="module")
def subject(smol, passages):
    return make_subject(*smol, [*passages[0], *passages[1]][:8], max_length=16, batch_size=4)


def test_linear_maps_of_the_last_layers(subject, states):
    costs = criteria["linear_map"].costs(subject)
    expected, errors = twins.linear_map(states, subject.batches, first=27)
    for start, stop in [(27, 28), (27, 29), (27, 30), (28, 29), (28, 30), (29, 30)]:
        assert costs.blocks[start, stop] == pytest.approx(expected[start, stop], rel=1e-4)
        assert costs.stderr[start, stop] == pytest.approx(errors[start, stop], rel=1e-3)


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
