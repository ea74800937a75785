"""The record of a healing."""

import json

import numpy as np
import pytest

import shallower as sh
from shallower.reporting.charts.run import smoothed
from shallower.results.healing import Healing


# The record
def test_the_record_comes_back_from_its_file(healed):
    out, record = healed
    loaded = Healing.load(out)
    assert loaded.to_json() == record.to_json()
    assert loaded == Healing.load(out / "healing.json")
    data = json.loads((out / "healing.json").read_text(), parse_constant=pytest.fail)
    assert (data["format"], data["version"]) == ("shallower.healing", 1)
    assert not re_path(out.parent, data)


def re_path(place, data):
    return str(place) in json.dumps(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("recipe"),
        lambda data: data.update(format="shallower.plan"),
        lambda data: data.update(steps=[{"step": 1}]),
        lambda data: data["model"].update(num_layers="4"),
        lambda data: data.update(held_out=[7]),
        lambda data: data.update(best_step=None),
    ],
)
def test_a_damaged_record_is_refused(healed, tmp_path, damage):
    data = json.loads((healed[0] / "healing.json").read_text())
    damage(data)
    (tmp_path / "healing.json").write_text(json.dumps(data))
    with pytest.raises(sh.ModelError, match="is not a healing of shallower, or is damaged"):
        Healing.load(tmp_path)


def test_smoothing_is_a_weighted_mean_of_what_was():
    values = np.array([3.0, 1.0, 2.0])
    weighted = (0.25 * 3 + 0.5 * 1 + 1 * 2) / 1.75
    assert smoothed(values, 0.5) == pytest.approx([3, (1.5 + 1) / 1.5, weighted])
    assert smoothed(np.full(9, 4.0), 0.9) == pytest.approx(np.full(9, 4.0))
