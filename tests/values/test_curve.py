"""Curve and TaskScores: stored and read, paired, what is damaged refused."""

import json
import math

import numpy as np
import pytest

from shallower.errors import TextsError
from shallower.values.curve import Curve, CurvePoint
from shallower.values.loss import Loss
from shallower.values.scores import Scores
from shallower.values.task_scores import TaskScores


def scores(values, task="boolq", chance=0.5, names=None):
    values = np.array(values, np.float64)
    names = tuple(names or map(str, range(len(values))))
    return TaskScores(task, "acc", names, Scores(values, np.ones(len(values))), 0, chance)


def loss(sums, counts=(3, 5, 2)):
    by_text = Scores(np.array(sums, np.float64), np.array(counts, np.float64))
    return Loss(by_text.mean, by_text.stderr, sum(counts), len(counts), 0, 100, by_text)


def curve():
    whole = CurvePoint(0, "whole", "cut", (), 0.0, 0.0, loss([3, 6, 2]), (scores([1, 1, 0, 1]),))
    cut = CurvePoint(
        2, "deepest", "cut", (1, 2), 0.5, 0.3, loss([4, 9, 3]), (scores([1, 0, 0, 1]),), 1.5
    )
    failed = CurvePoint(2, "deepest", "patched", (1, 2), 0.5, 0.3, None, failed="no residual")
    return Curve(
        "tiny",
        4,
        (whole, cut, failed),
        {"report": 3},
        "float32",
        256,
        {"torch": "2"},
        {"patch": "full"},
    )


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


def test_a_curve_is_read_as_it_was_stored():
    one = curve()
    read = Curve.from_json(json.loads(json.dumps(one.to_json())))
    assert read == one
    assert read.to_json() == one.to_json()
    assert read.points[1].tasks[0].by_item.sums.tolist() == [1, 0, 0, 1]
    assert read.strategies == ("deepest",)
    assert read.tasks == ("boolq",)
    assert [point.n for point in read.line("deepest", "cut")] == [0, 2]
    assert read.lost(read.points[1]).mean == pytest.approx(0.5)
    assert read.lost(read.points[2]) is None
    assert read.points[1].task("mmlu") is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("points",), []),
        (("points", 0, "n"), 3),
        (("points", 1, "state"), "broken"),
        (("points", 1, "tasks", 0, "by_item"), [1, 0]),
        (("points", 1, "tasks", 0, "items"), "abc"),
        (("num_layers",), "4"),
        (("points", 1, "dropped"), [1.5]),
    ],
)
def test_damage_is_refused(path, value):
    data = json.loads(json.dumps(curve().to_json()))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((KeyError, TypeError, ValueError)):
        Curve.from_json(data)
