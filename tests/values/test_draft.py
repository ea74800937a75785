"""Draft: the speed-up against plain sums, a simulation and published values; what breaks even."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shallower.values.draft import LONGEST, Draft, acceptance_for, best_length, speedup

PUBLISHED = [(0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 2, 2.71),
             (0.9, 10, 6.86)]  # fmt: skip
"""Acceptance, tokens of a draft and speed-up at no cost, of table 1 of 2211.17192."""

shares, costs, lengths = st.floats(0, 1), st.floats(0, 1.5), st.integers(1, LONGEST)


def tokens_of(acceptance, length):
    """The expected tokens of a forward: by how many of a draft it may accept, and their odds."""
    odds = np.append(np.full(length, 1 - acceptance), 1.0)
    odds *= np.float64(acceptance) ** np.arange(length + 1)
    return float((odds * np.arange(1, length + 2)).sum())


def brute(acceptance, cost):
    """The speed-up of every length from 0 on, in float64."""
    return np.array([tokens_of(acceptance, n) / (1 + n * cost) for n in range(LONGEST + 1)])


@pytest.mark.parametrize(("acceptance", "length", "published"), PUBLISHED)
def test_published_speedups(acceptance, length, published):
    assert round(speedup(acceptance, 0.0, length), 2) == published


@given(shares, costs, lengths)
def test_the_speedup_is_the_sum_over_what_may_be_accepted(acceptance, cost, length):
    assert speedup(acceptance, cost, length) == pytest.approx(brute(acceptance, cost)[length])
    assert speedup(acceptance, cost, 0) == 1
    assert speedup(1.0, cost, length) == pytest.approx((length + 1) / (length * cost + 1))


@given(st.floats(0.01, 0.99), costs, lengths)
def test_the_speedup_is_that_of_the_closed_formula(acceptance, cost, length):
    tokens = (1 - acceptance ** (length + 1)) / (1 - acceptance)
    expected = tokens / (length * cost + 1)
    assert speedup(acceptance, cost, length) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("acceptance", "cost", "length"), [(0.8, 0.3, 3), (0.95, 0.1, 16)])
def test_a_simulation_takes_as_long(acceptance, cost, length):
    """Tokens are accepted up to the first that is not, and the whole model adds one."""
    drawn = np.random.default_rng(0).random((200_000, length)) < acceptance
    tokens = 1 + np.cumprod(drawn, axis=1).sum(1)
    found, error = tokens.mean(), tokens.std() / np.sqrt(len(tokens))
    taken = 1 + length * cost
    assert speedup(acceptance, cost, length) == pytest.approx(found / taken, abs=4 * error / taken)


@given(shares, costs)
def test_the_best_length_is_that_of_all(acceptance, cost):
    draft, all_of_them = Draft(cost, acceptance), brute(acceptance, cost)
    assert draft.speedup == pytest.approx(all_of_them.max())
    assert all_of_them[draft.length] == pytest.approx(all_of_them.max())
    assert draft.speedup >= 1


@given(shares, costs)
def test_a_draft_pays_where_more_is_accepted_than_it_costs(acceptance, cost):
    """Over all lengths, as a brute search says; the shortest draft is the first that pays."""
    assume(abs(acceptance - cost) > 1e-9)
    pays = bool((brute(acceptance, cost)[1:] > 1 + 1e-12).any())
    assert pays == (acceptance > cost)
    assert (Draft(cost, acceptance).length > 0) == pays
    even = Draft(cost).break_even
    assert pays == (even is not None and acceptance > even)


@given(st.floats(1.01, 3), costs)
def test_the_least_acceptance_for_a_speedup(wanted, cost):
    found = acceptance_for(wanted, cost)
    if found is None:
        assert brute(1.0, cost).max() < wanted
        return
    assert brute(found, cost).max() == pytest.approx(wanted, rel=1e-9)
    if found > 1e-6:
        assert brute(found - 1e-6, cost).max() < wanted


def test_worthwhile_and_never():
    assert Draft(0.5).worthwhile == pytest.approx(acceptance_for(1.25, 0.5))
    assert brute(Draft(0.5).worthwhile, 0.5).max() == pytest.approx(1.25)
    most = ((LONGEST + 1) / 1.25 - 1) / LONGEST  # what 1.25 times costs if all is accepted
    assert Draft(most - 1e-6).worthwhile == pytest.approx(1.0, abs=1e-4)
    assert Draft(most + 1e-6).worthwhile is None
    assert Draft(0.999).break_even == 0.999
    assert Draft(1.0).break_even is None
    assert (Draft(0.5, 0.5).length, Draft(0.5, 0.5).speedup) == (0, 1.0)
    assert (Draft(2.0, 1.0).length, Draft(2.0, 1.0).speedup) == (0, 1.0)


def test_at_no_cost_a_draft_is_as_long_as_it_may_be():
    assert best_length(0.9, 0.0) == LONGEST
    assert Draft(0.0, 1.0).speedup == LONGEST + 1
    assert best_length(0.0, 0.0) == 0


@given(st.floats(0.05, 0.95), st.floats(0, 0.9))
def test_the_error_of_the_speedup_is_its_slope(acceptance, cost):
    draft = Draft(cost, acceptance, 0.01)
    step = 1e-6
    up, down = (speedup(acceptance + side * step, cost, draft.length) for side in (1, -1))
    assert draft.speedup_stderr == pytest.approx(0.01 * (up - down) / (2 * step), abs=1e-6)


def test_what_is_not_known_is_not_told():
    draft = Draft(0.5)
    assert (draft.length, draft.speedup, draft.speedup_stderr) == (None, None, None)
    assert Draft(0.5, 0.8).speedup_stderr is None
    stored = json.loads(json.dumps(Draft(0.5, 0.8, 0.02).to_json(), allow_nan=False))
    assert stored["length"] == 2
    assert stored["speedup"] == pytest.approx(1.22)
    assert stored["break_even"] == 0.5
