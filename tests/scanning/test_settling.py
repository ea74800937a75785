"""The rule by which a scan stops: against its slow twin, and by how often it is wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import Until
from shallower.scanning.settling import Asymptotic, Betting, Settling
from shallower.settings.until import Settled
from tests import reference

NUM_LAYERS = 5
SIZES = 1, 2, 4
RULES = [False, True]


def texts(count, *, seed=0, spread=0.02, gap=0.05):
    """Distances of all pairs of states, (count, pairs) float32: alike for a text, apart by pair."""
    rng = np.random.default_rng(seed)
    num = NUM_LAYERS * (NUM_LAYERS + 1) // 2
    level = rng.normal(0.3, 0.05, (count, 1))
    values = level + np.linspace(0, gap, num) + rng.normal(0, spread, (count, num))
    return np.clip(values, 0, 1).astype(np.float32)


def of_size(samples, n):
    """The distances of the blocks of one size, from the square of all states."""
    square = np.zeros((len(samples), NUM_LAYERS + 1, NUM_LAYERS + 1))
    square[:, *np.triu_indices(NUM_LAYERS + 1, 1)] = samples
    return np.stack([square[:, start, start + n] for start in range(NUM_LAYERS - n + 1)], axis=1)


def settled_after(samples, until, *, metric="angular", tokens=1.0):
    settling = Settling(until.of(NUM_LAYERS), NUM_LAYERS, metric)
    settling.take([samples])
    settling.judge(len(samples), tokens)
    return settling.settled.by_size


@pytest.mark.parametrize("exact", RULES)
@given(
    count=st.integers(2, 200),
    seed=st.integers(0, 100),
    tolerance=st.sampled_from([0.0, 0.005, 0.05, 0.3]),
    confidence=st.sampled_from([0.1, 0.9, 0.99]),
)
def test_the_rule_says_what_its_slow_twin_says(exact, count, seed, tolerance, confidence):
    samples = texts(count, seed=seed)
    found = settled_after(samples, Until(confidence, tolerance, SIZES, exact))
    for n, after in found.items():
        expected = reference.is_settled(
            of_size(samples, n), (1 - confidence) / 3, tolerance=tolerance, exact=exact
        )
        assert (after is not None) == expected, n


@pytest.mark.parametrize("exact", RULES)
@given(cuts=st.lists(st.integers(0, 150), max_size=6))
def test_the_bits_do_not_depend_on_how_texts_are_divided(exact, cuts):
    samples = texts(150).astype(np.float64)
    rules = [Betting(15, 0.01, 0.005) if exact else Asymptotic(15, 0.01, 0.005) for _ in range(2)]
    rules[0].take(samples)
    for part in np.split(samples, sorted(cuts)):
        rules[1].take(part)
    for name, value in vars(rules[0]).items():
        assert np.array_equal(value, vars(rules[1])[name]), name


@pytest.mark.parametrize("exact", RULES)
def test_a_cosine_is_the_better_the_larger(exact):
    samples = texts(400, gap=1.0)
    until = Until(0.9, 0.1, SIZES, exact)
    assert settled_after(1 - samples, until, metric="cosine")[1] == 400
    first = np.linspace(0, 1, 15)[::-1].astype(np.float32)
    assert settled_after(samples * 0 + first, until, metric="cosine")[1] == 400


def test_several_tokens_of_a_text_are_one_observation():
    samples = texts(200, gap=0.0)
    until = Until(0.9, 0.012, SIZES)
    once = settled_after(samples, until)
    assert settled_after(4 * samples, until, tokens=4.0) == once
    assert None not in once.values()
    assert None in settled_after(4 * samples, until).values()


def test_nothing_is_settled_before_the_burn_in():
    until = Until(0.9, 0.9, SIZES)
    assert set(settled_after(texts(63), until).values()) == {None}
    assert set(settled_after(texts(64), until).values()) == {64}


def test_candidates_that_never_differ_are_settled():
    same = np.full((64, 15), 0.25, np.float32)
    assert set(settled_after(same, Until(0.9, 0.0, SIZES)).values()) == {64}


def test_bets_can_lose_all():
    rule = Betting(2, 0.5, 0.0)
    rule.take(np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert not rule.is_settled(1.0)
    assert not np.isnan(rule._wealth).any()


def test_a_size_that_is_no_longer_sure_is_open_again():
    settled = Settled(Until(0.9, sizes=(1, 2)), (None, None))
    settled = settled.seen([True, False], 128).seen([True, True], 256)
    assert settled.by_size == {1: 128, 2: 256}
    assert settled.all
    assert settled.seen([False, True], 384).seen([True, True], 512).by_size == {1: 512, 2: 256}


# How often it is wrong.
def normal(rng, count):
    return rng.normal(0, 0.1, count)


def skewed(rng, count):
    """Mostly a little less, now and then much more."""
    return rng.gamma(2, 0.05, count) - 0.1


@pytest.mark.parametrize("draw", [normal, skewed])
@pytest.mark.parametrize("exact", RULES)
def test_an_excess_is_missed_as_rarely_as_it_says(draw, exact):
    """Candidates worse than the last one by the tolerance are shown not to be, at any time."""
    repeats = 100
    kind = Betting if exact else Asymptotic
    rule = kind(repeats + 1, 0.05 * repeats, 0.01)  # an error of 0.05 a pair
    excess = 0.01 + draw(np.random.default_rng(0), (512, repeats)).clip(-0.4, 0.4)
    values = np.append(0.5 + excess, np.full((512, 1), 0.5), axis=1)
    wrong = np.zeros(repeats, bool)
    for part in values.reshape(-1, 16, repeats + 1):
        rule.take(part)
        wrong |= [rule.shown(one, 1.0)[-1] for one in range(repeats)]
    assert wrong.mean() <= 0.05
