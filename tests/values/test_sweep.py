"""Which share of its layers a model bears at a loss, and the record of a sweep."""

import math

import pytest

from shallower.values.scores import Estimate
from shallower.values.sweep import BestCut, Sweep, SweepJob, borne, share_borne


def cuts(*losses, stderr=0.05):
    """Cuts of 10 %, 20 %, … of the layers."""
    return [
        BestCut("m", "cut", place / 10, Estimate(lost, stderr), tuple(range(place)), "angular")
        for place, lost in enumerate(losses, 1)
    ]


@pytest.mark.parametrize(
    ("losses", "loss", "share"),
    [
        ((0.2,), 0.1, 0.05),
        ((0.2,), 0.2, 0.1),
        ((0.2,), 0.3, 0.1),
        ((0.1, 0.5), 0.3, 0.15),
        ((0.4, 0.1, 0.9), 0.2, 0.05),  # the first time that it exceeds
        ((-0.1, 0.3), 0.1, 0.15),
        ((), 0.1, 0.0),
    ],
)
def test_a_model_bears_what_stays_below_the_loss(losses, loss, share):
    assert share_borne(cuts(*losses), loss) == pytest.approx(share)


def test_the_error_is_of_lines_that_are_one_standard_error_higher_and_lower():
    low, end = borne(cuts(0.1, 0.5, stderr=0.1), (0.1, 0.5))
    assert (low.low, low.share) == (pytest.approx(0.05), pytest.approx(0.1))
    assert low.high == pytest.approx(0.1 + 0.1 * 0.1 / 0.4)
    assert low.stderr == pytest.approx((low.high - low.low) / 2)
    assert str(low) == "10.0 % (5.0 to 12.5), 1 of 10 layers"
    assert (end.share, end.high, end.most) == (0.2, 0.2, 0.2)
    assert math.isnan(end.stderr)
    assert str(end) == "≥ 20.0 % (17.5 to ≥ 20.0), 2 of 10 layers"
    (all_of_it,) = borne(cuts(0.1), (0.5,))
    assert str(all_of_it) == "≥ 10.0 %, 1 of 10 layers"


def test_less_than_one_layer_is_no_share_that_can_go():
    (less, more) = borne(cuts(0.2, 0.4), (0.19, 0.3))
    assert (less.share, str(less)) == (pytest.approx(0.095), "less than 1 of 10 layers")
    assert str(more) == "15.0 % (12.5 to 17.5), 1 of 10 layers"


def test_a_record_is_read_as_it_was_written():
    jobs = (
        SweepJob("a", "scan", "m", "t", ("scan", "a b"), "failed", "no room", 1.5),
        SweepJob("b", "compare", "m", "t", ("compare", "m"), "done"),
    )
    sweep = Sweep("sweep.yaml", jobs, (0.1,), ("cut", "healed"))
    written = sweep.to_json()
    assert Sweep.from_json(written) == sweep
    assert written["jobs"][0]["command"] == "shallower scan 'a b'"
    assert (written["complete"], [job.name for job in sweep.failed]) == (False, ["a"])
    with pytest.raises(ValueError, match="version 1"):
        Sweep.from_json({**written, "version": 2})
