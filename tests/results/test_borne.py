"""Which share of its layers a model bears at a loss."""

import math

import pytest

from shallower.results.comparison import LOSSES, Row, borne, share_borne
from shallower.results.scores import Estimate, Standing


def cuts(*losses, stderr=0.05):
    """Cuts of 10 %, 20 %, … of the layers."""
    standings = [Standing(Estimate(3.0, 0.1), Estimate(lost, stderr)) for lost in losses]
    return [
        (Row("m", "c4", "angular", n, "cut", tuple(range(n)), one, None, n / 10, n / 10), one)
        for n, one in enumerate(standings, 1)
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


def at(loss, *losses, stderr=0.05):
    """The share that is borne at one of the losses."""
    found = borne(cuts(*losses, stderr=stderr))
    assert [one.loss for one in found] == [*LOSSES]
    return found[LOSSES.index(loss)]


def test_the_error_is_of_lines_that_are_one_standard_error_higher_and_lower():
    low, end = (at(loss, 0.1, 0.5, stderr=0.1) for loss in (0.1, 0.5))
    assert (low.low, low.share) == (pytest.approx(0.05), pytest.approx(0.1))
    assert low.high == pytest.approx(0.1 + 0.1 * 0.1 / 0.4)
    assert low.stderr == pytest.approx((low.high - low.low) / 2)
    assert str(low) == "10.0 % (5.0 to 12.5), 1 of 10 layers"
    assert (end.share, end.high, end.most) == (0.2, 0.2, 0.2)
    assert math.isnan(end.stderr)
    assert str(end) == "≥ 20.0 % (17.5 to ≥ 20.0), 2 of 10 layers"
    assert str(at(0.5, 0.1)) == "≥ 10.0 %, 1 of 10 layers"


def test_less_than_one_layer_is_no_share_that_can_go():
    less, more = at(0.1, 0.2, 0.4), at(0.2, 0.1, 0.3)
    assert (less.share, str(less)) == (pytest.approx(0.05), "less than 1 of 10 layers")
    assert str(more) == "15.0 % (12.5 to 17.5), 1 of 10 layers"
