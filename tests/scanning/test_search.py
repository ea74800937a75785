"""The k best blocks and the best plan of several, against trying them all."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import Block, LayersError, analyse_states
from tests import reference
from tests.scanning.samples import exact_sums

BOTH = ("angular", "cosine")


def walk(num_samples, num_states, seed, width=16):
    """States that move away from the first one, as a residual stream does."""
    steps = np.random.default_rng(seed).standard_normal((num_samples, num_states, width))
    return steps.cumsum(axis=1)


def dyadic(num_states, seed):
    """Two samples whose angular distances are few multiples of 1/4, so that many are equal."""
    rng = np.random.default_rng(seed)
    circle = np.array([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0]], dtype=float)
    return circle[rng.integers(0, len(circle), (2, num_states))]


def exact_costs(scan, metric):
    """The cost of every pair in whole units of the sums: Python's integers."""
    states = scan.num_layers + 1
    sums = iter(exact_sums(scan, metric))
    costs = np.zeros((states, states), dtype=object)
    for start in range(states):
        for stop in range(start + 1, states):
            costs[start, stop] = next(sums)
    return (scan.num_samples << 48) - costs if metric == "cosine" else costs


@st.composite
def scans(draw, max_states=9):
    num_states, seed = draw(st.integers(3, max_states)), draw(st.integers(0, 2**32))
    if draw(st.booleans()):
        return analyse_states(dyadic(num_states, seed), BOTH)
    return analyse_states(walk(draw(st.integers(1, 4)), num_states, seed), BOTH)


# The k best blocks
@given(scans(), st.integers(1, 12), st.sampled_from(BOTH))
def test_the_best_blocks_are_all_blocks_in_order(scan, k, metric):
    costs = exact_costs(scan, metric)
    for n in range(1, scan.num_layers):
        starts = range(scan.num_layers - n + 1)
        expected = sorted(starts, key=lambda start: (costs[start, start + n], start))[:k]
        found = scan.best_blocks(n, k, metric)
        assert [block.start for block in found] == expected
        assert {len(block) for block in found} == {n}
        for block in found:
            again = scan.scored(block, metric)
            assert block.score == again.score
            assert np.array_equal(block.stderr, again.stderr, equal_nan=True)
        assert found[0] == scan.best_block(n, metric)


@pytest.mark.parametrize("k", [0, -1, -(10**30), 1.0, "2", None, True])
def test_no_best_blocks_are_refused(k):
    with pytest.raises(LayersError):
        analyse_states(walk(3, 7, 0)).best_blocks(2, k)


# The best plan
@given(scans(), st.data())
def test_the_best_plan_is_the_best_of_all(scan, data):
    metric = data.draw(st.sampled_from(BOTH))
    first, last = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    free = scan.num_layers - first - last
    n = data.draw(st.integers(1, scan.num_layers - 1))
    max_blocks = data.draw(st.integers(1, 5))
    if n > free:
        with pytest.raises(LayersError, match="protected"):
            scan.best_plan(n, max_blocks, protect_first=first, protect_last=last, metric=metric)
        return
    plan = scan.best_plan(n, max_blocks, protect_first=first, protect_last=last, metric=metric)
    costs = exact_costs(scan, metric)
    expected = reference.best_plan(costs, n, max_blocks, protect_first=first, protect_last=last)
    assert [(block.start, block.stop) for block in plan.blocks] == expected
    for block in plan.blocks:
        assert block.score == scan.scored(block, metric).score


@given(scans(), st.sampled_from(BOTH))
def test_one_block_without_protection_is_the_best_block(scan, metric):
    for n in range(1, scan.num_layers):
        assert scan.best_plan(n, metric=metric).blocks == (scan.best_block(n, metric),)
        assert scan.plan(n, metric).blocks == (scan.best_block(n, metric),)


def test_two_good_blocks_apart_are_found_and_one_layer_stays_between_them():
    states = walk(5, 13, 1, width=64)
    states[:, 4] = states[:, 2]
    states[:, 9] = states[:, 6]
    scan = analyse_states(states)
    assert scan.best_plan(5, 2).blocks == (Block(2, 4), Block(6, 9))
    assert sum(block.score for block in scan.best_plan(5, 2).blocks) == 0
    assert len(scan.best_plan(5, 1).blocks) == 1
    equal = analyse_states(np.ones((2, 8, 4)))
    assert equal.best_plan(5, 3).blocks == (Block(0, 5),)
    for blocks in (scan.best_plan(n, 12).blocks for n in range(1, 12)):
        gaps = [right.start - left.stop for left, right in pairwise(blocks)]
        assert all(gap >= 1 for gap in gaps)


def test_eighty_layers_are_planned():
    plan = analyse_states(walk(3, 81, 3)).best_plan(40, 10**30, protect_first=4, protect_last=2)
    assert len(plan.dropped) == 40
    assert plan.dropped[0] >= 4
    assert plan.dropped[-1] < 78


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 0}, "expected 1 <= n <= 7"),
        ({"n": 8}, "expected 1 <= n <= 7"),
        ({"n": 10**30}, "expected 1 <= n <= 7"),
        ({"n": 2, "max_blocks": 0}, "max_blocks = 0"),
        ({"n": 2, "max_blocks": -(10**30)}, "max_blocks"),
        ({"n": 2, "protect_first": -1}, "protect_first = -1"),
        ({"n": 2, "protect_last": -1}, "protect_last = -1"),
        ({"n": 2, "protect_first": 7}, "first 7 and the last 0 protected"),
        ({"n": 2, "protect_first": 3, "protect_last": 4}, "first 3 and the last 4 protected"),
        ({"n": 2, "protect_last": 10**30}, "protected"),
        ({"n": 2.0}, "integer"),
        ({"n": 2, "max_blocks": "2"}, "integer"),
        ({"n": 2, "protect_first": None}, "integer"),
    ],
    ids=str,
)
def test_impossible_plans_are_refused(options, said):
    with pytest.raises(LayersError, match=said):
        analyse_states(walk(3, 9, 0)).best_plan(**options)
