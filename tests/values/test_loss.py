"""Losses and comparisons."""

import json
import math

import pytest

from shallower import (
    Block,
    Comparison,
    Cut,
    Loss,
)


def test_a_loss_is_normalized_by_the_logarithm_of_the_vocabulary():
    uniform = Loss(math.log(50_000), 0.5, 1000, 10, 0, 50_000)
    assert uniform.normalized == pytest.approx(1)
    assert uniform.normalized_stderr == pytest.approx(0.5 / math.log(50_000))


def test_a_loss_is_printed_with_its_error_where_there_is_one():
    assert str(Loss(2.34567, 0.01234, 1000, 10, 0, 100)) == "2.346 ± 0.012"
    assert str(Loss(2.34567, math.nan, 1000, 1, 0, 100)) == "2.346"


def test_a_comparison_is_strict_json():
    base = Loss(2.5, math.nan, 100, 1, 0, 1000)
    cut = Cut("similarity", Block(2, 4, 0.25, math.nan), Loss(2.75, 0.125, 100, 2, 1, 1000))
    data = json.loads(json.dumps(Comparison(base, (cut,)).to_json(), allow_nan=False))
    assert data["base"]["nats"] == 2.5
    assert data["base"]["stderr"] is None
    assert data["base"]["normalized"] == pytest.approx(2.5 / math.log(1000))
    assert data["cuts"][0]["strategy"] == "similarity"
    assert data["cuts"][0]["drop"] == {"start": 2, "stop": 4, "score": 0.25, "stderr": None}
    assert data["cuts"][0]["loss"]["stderr"] == 0.125
