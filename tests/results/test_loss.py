"""Losses and comparisons."""

import json
import math

import numpy as np
import pytest

from shallower import Loss, TextsError
from shallower.results.loss import FIGURES, recovered
from shallower.results.scores import Scores


def test_a_loss_is_normalized_by_the_logarithm_of_the_vocabulary():
    uniform = Loss(math.log(50_000), 0.5, 1000, 10, 0, 50_000)
    assert uniform.normalized == pytest.approx(1)
    assert uniform.normalized_stderr == pytest.approx(0.5 / math.log(50_000))


def test_a_loss_is_printed_with_its_error_where_there_is_one():
    assert str(Loss(2.34567, 0.01234, 1000, 10, 0, 100)) == "2.346 ± 0.012"
    assert str(Loss(2.34567, math.nan, 1000, 1, 0, 100)) == "2.346"


def by_text(*sums, tokens=10.0):
    scores = Scores(np.array(sums, float), np.full(len(sums), tokens))
    num_tokens = int(scores.weights.sum())
    return Loss(scores.mean, scores.stderr, num_tokens, len(sums), 0, 100, scores)


def test_a_recovered_share_and_its_error_are_those_of_all_texts_but_one():
    """A ratio of sums by the jackknife, of a cut that loses about 1 nat and gets back 0.7."""
    generator = np.random.default_rng(0)
    whole = generator.uniform(20, 40, 60)
    cut = whole + 10 * generator.uniform(0.5, 1.5, 60)
    patched = cut - (cut - whole) * generator.uniform(0.4, 1.0, 60)
    losses = {name: by_text(*sums) for name, sums in
              (("whole", whole), ("cut", cut), ("patched", patched))}  # fmt: skip
    found = recovered(losses)
    assert found.mean == pytest.approx((cut - patched).sum() / (cut - whole).sum())
    left = [np.delete(cut - patched, i).sum() / np.delete(cut - whole, i).sum() for i in range(60)]
    assert found.stderr == pytest.approx(math.sqrt(59 * np.var(left)), rel=0.02)
    del losses["patched"]
    assert math.isnan(recovered(losses).mean)
    assert math.isnan(recovered({"whole": by_text(9), "cut": by_text(9), "x": by_text(8)}).mean)


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
