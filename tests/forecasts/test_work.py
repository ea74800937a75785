"""Work: one count, summed for its seconds and for its passes over layers on disk."""

import numpy as np
import pytest

from shallower.forecasts.speed import Work
from shallower.forecasts.work import run
from shallower.patching.solver import SOLVING, STEPPING, PatchLayers


def test_a_sum_is_one_after_the_other_and_a_multiple_is_together():
    one = run(np.array([10, 20]), 6, 1, passes=2)
    assert (one.layers, one.heads) == (180, 30)
    assert one.passes == ((2, 4 / 2 * 30),)
    both = one + one * 3
    assert (both.layers, both.heads) == (720, 120)
    assert both.passes == ((2, 60), (2, 180))
    assert both.seconds(Work(layers=2, heads=1)) == 2 * 720 + 120


@pytest.mark.parametrize(
    ("dropped", "walked", "judged", "rest", "moved"),
    [([2, 3], 4, 5 + 3 * 3 + 3, 2, 3), ([2, 4], 6, 5 + 3 * 3 + 3 + 2, 1, 3)],
)
def test_the_layers_of_a_patch(dropped, walked, judged, rest, moved):
    """Of six: from layer 1 on there are three left, and from layer 3 on two."""
    found = PatchLayers.of(6, dropped)
    assert (found.walked, found.judged, found.rest, found.moved) == (walked, judged, rest, moved)
    on = {"fitted": 8, "held_out": 1, "descended": 8, "stepped": 16}
    steps, solved = STEPPING * moved * 16, SOLVING * found.num_blocks * 9
    assert found.times(**on) == walked * 9 + judged + 8 * rest + steps + solved
    assert found.passes(2) == (walked + judged + rest + 5 * moved) / 6
