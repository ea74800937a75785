"""Losses and comparisons."""

import json
import math

import numpy as np
import pytest

from shallower import Block, Comparison, Cut, Loss, TextsError
from shallower.values.loss import FIGURES
from shallower.values.scores import Scores


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
    assert data["cuts"][0]["difference"] is None
    assert data["ties"] == []


def by_text(*sums, tokens=10.0):
    scores = Scores(np.array(sums, float), np.full(len(sums), tokens))
    num_tokens = int(scores.weights.sum())
    return Loss(scores.mean, scores.stderr, num_tokens, len(sums), 0, 100, scores)


def test_a_difference_is_paired_by_text():
    one, other = by_text(20, 120, 231), by_text(10, 110, 220)
    found = one.minus(other)
    assert found.mean == pytest.approx(31 / 30)
    # (10 - 31/3)² + (10 - 31/3)² + (11 - 31/3)² = 2/3, times 3/2, over 30².
    assert found.stderr == pytest.approx(1 / 30)
    assert found.stderr < one.stderr / 30
    assert not found.tied
    assert other.minus(one).mean == -found.mean
    assert str(found) == "+1.033 ± 0.033"
    assert one.minus(one).tied


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Loss(2.5, 0.1, 30, 3, 0, 100), "measure both with evaluate_loss"),
        (by_text(1, 2), "30 tokens of 3 texts, and 20 of 2; measure both on the same"),
        (by_text(1, 2, 3, tokens=9.0), "30 tokens of 3 texts, and 27 of 3"),
    ],
)
def test_losses_that_cannot_be_paired_are_refused(other, message):
    with pytest.raises(TextsError, match=message):
        by_text(1, 2, 3).minus(other)
    with pytest.raises(TextsError, match="measure both"):
        other.minus(by_text(1, 2, 3))


def test_losses_by_text_are_no_part_of_the_figures():
    loss = by_text(20, 120, 231)
    assert loss == Loss(*(getattr(loss, name) for name in FIGURES))
    assert set(loss.to_json()) == {*FIGURES, "normalized"}
    assert "by_text" not in repr(loss)
    assert hash(loss) == hash(Loss(*(getattr(loss, name) for name in FIGURES)))


@pytest.mark.parametrize("loss", [by_text(20, 120, 231), by_text(20), Loss(2.0, 0.1, 3, 4, 5, 6)])
def test_a_record_of_a_loss_is_read_as_it_was(loss):
    found = Loss.from_json(json.loads(json.dumps(loss.to_record(), allow_nan=False)))
    assert found.to_record() == loss.to_record()
    assert Loss.from_json(loss.to_json()).by_text is None


@pytest.mark.parametrize(
    "change",
    [
        {"nats": "2"}, {"num_texts": 3.0}, {"stderr": "x"}, {"by_text": 3},
        {"by_text": {"sums": [1.0]}}, {"by_text": {"sums": ["1"], "weights": [1.0]}},
        {"by_text": {"sums": [1.0], "weights": [1.0, 2.0]}},
    ],
)  # fmt: skip
def test_a_record_that_is_damaged_is_refused(change):
    record = {**by_text(20, 120, 231).to_record(), **change}
    with pytest.raises((TypeError, KeyError, ValueError)):
        Loss.from_json(record)
    with pytest.raises((TypeError, KeyError)):
        Loss.from_json({name: value for name, value in record.items() if name != "num_tokens"})


def test_blocks_of_one_size_that_cannot_be_told_apart_are_ties():
    cuts = [
        Cut("similarity", Block(2, 4), by_text(31, 130, 241)),
        Cut("deepest", Block(3, 5), by_text(30, 131, 240)),
        Cut("similarity", Block(2, 3), by_text(21, 121, 231)),
        Cut("deepest", Block(4, 5), by_text(30, 130, 240)),
        Cut("similarity", Block(0, 4), by_text(50, 150, 260)),
        Cut("deepest", Block(0, 4), by_text(50, 150, 260)),
    ]
    comparison = Comparison.of(by_text(20, 120, 230), cuts)
    assert comparison.ties == (2,)
    assert [cut.difference.tied for cut in comparison.cuts] == [False] * 6
    data = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert data["ties"] == [2]
    assert data["cuts"][4]["difference"] == {"mean": 3, "stderr": 0, "num_items": 3, "tied": False}
    assert Comparison.from_json(data) == comparison
    for change in ({"ties": [2.5]}, {"cuts": [{**data["cuts"][0], "difference": {"mean": 1}}]}):
        with pytest.raises((KeyError, TypeError)):
            Comparison.from_json({**data, **change})


def test_a_single_text_has_no_error_and_so_a_tie():
    comparison = Comparison.of(by_text(20), [Cut("deepest", Block(1, 2), by_text(40))])
    (cut,) = comparison.cuts
    assert (cut.difference.mean, cut.difference.tied) == (2, True)
    data = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert data["cuts"][0]["difference"]["stderr"] is None
    assert Comparison.from_json(data).to_json() == data
