"""CriteriaComparison: stored and read, what is damaged refused."""

import json
import math
from dataclasses import replace

import pytest

from shallower.results.comparison import CriteriaComparison
from shallower.results.scores import UNKNOWN, Estimate
from tests.reporting.comparisons import curve, starts


def stored(found):
    """A comparison as its file has it."""
    return json.loads(json.dumps(found.to_json(), allow_nan=False))


def test_a_comparison_is_read_as_it_was_stored():
    """Nested values of every kind, with what is not known and what failed."""
    one = curve(sizes=(4, 8))
    rows = [replace(row, choice_seconds=0.5, layer_forwards=7) for row in one.rows]
    rows[0] = replace(rows[0], experts="3:1,2", score=Estimate(0.5, 0.1), accuracy=0.25, tau=-0.5)
    rows[1] = replace(rows[1], standing=replace(rows[1].standing, regret=UNKNOWN))
    models = (replace(one.models[0], single_layers=(3.5, 4.0), starts={"c4": starts(32)}),)
    one = replace(one, models=models, rows=tuple(rows), failures={"m": "why"}, ended=False)
    read = CriteriaComparison.from_json(stored(one))
    assert read.to_json() == one.to_json()
    assert stored(read)["whole"]["loss"] == one.models[0].whole.nats
    assert read.models[0].starts["c4"] == starts(32)
    assert (
        read.models[0].tasks[0].by_item.sums.tolist()
        == one.models[0].tasks[0].by_item.sums.tolist()
    )
    assert math.isnan(read.rows[1].standing.regret.mean)
    failed = next(row for row in read.rows if row.failed)
    assert (failed.standing, failed.speech, failed.tasks) == (None, None, ())
    for row, known in zip(read.rows, one.rows, strict=True):
        assert replace(row, standing=None, speech=None) == replace(
            known, standing=None, speech=None
        )
        assert (row.speech is None) == (known.speech is None)
        if known.standing is not None:
            assert row.standing.loss == known.standing.loss
            assert row.standing.difference == known.standing.difference
    assert (read.states, read.criteria) == (("cut", "patched", "healed"), ("angular", "deepest"))
    assert read.rows[0].task("mmlu") == one.rows[0].tasks[0]
    assert read.rows[0].task("unheard") is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 1),
        (("version",), 3),
        (("format",), "shallower.curve"),
        (("rows",), "abc"),
        (("rows", 0, "n"), "3"),
        (("rows", 0, "state"), "broken"),
        (("rows", 0, "dropped"), [1.5]),
        (("rows", 0, "tasks", 0, "by_item"), [1, 0]),
        (("rows", 0, "tasks", 0, "items"), "abc"),
        (("rows", 0, "speech"), "said"),
        (("models", 0, "num_layers"), "4"),
        (("models", 0, "starts"), [1]),
    ],
)
def test_damage_is_refused(path, value):
    data = stored(curve(sizes=(4,), states=("cut",)))
    place = data
    for key in path[:-1]:
        place = place[key]
    assert path[-1] in place or isinstance(place, list)
    place[path[-1]] = value
    with pytest.raises((KeyError, TypeError, ValueError)):
        CriteriaComparison.from_json(data)
