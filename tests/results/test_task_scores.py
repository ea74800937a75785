"""TaskScores: their errors, pairs and chance."""

import math

import numpy as np
import pytest

from shallower.errors import TextsError
from shallower.results.scores import Scores
from shallower.results.task_scores import TaskScores


def scores(values, task="boolq", chance=0.5, names=None):
    values = np.array(values, np.float64)
    names = tuple(names or map(str, range(len(values))))
    return TaskScores(task, "acc", names, Scores(values, np.ones(len(values))), 0, chance)


def test_errors_are_those_of_the_sample():
    values = np.random.default_rng(0).integers(0, 2, 50)
    found = scores(values)
    assert found.mean == pytest.approx(values.mean(), abs=1e-15)
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-12)
    assert math.isnan(scores([1]).stderr)
    other = np.random.default_rng(1).integers(0, 2, 50)
    difference = found.minus(scores(other))
    assert difference.mean == pytest.approx((values - other).mean(), abs=1e-15)
    expected = (values - other).std(ddof=1) / math.sqrt(50)
    assert difference.stderr == pytest.approx(expected, rel=1e-12)


def test_other_items_are_not_paired():
    with pytest.raises(TextsError, match="boolq/acc of 2 items with 0 examples, and boolq/acc"):
        scores([1, 0]).minus(scores([1, 0], names=["4", "5"]))


def test_chance():
    assert scores([1, 0, 1, 0]).at_chance
    assert not scores([1] * 30 + [0]).at_chance
    assert not scores([0, 0, 1, 0], chance=None).at_chance
