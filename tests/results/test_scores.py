"""Scores of some items: the mean over all is estimated from those of something else; and paired
differences.
"""

import math

import numpy as np
import pytest

from shallower.results.scores import Difference, Estimate, Scores


def drawn(generator, size):
    """Sums and weights of items, of a model and of a cut that loses more on hard ones."""
    weights = generator.integers(20, 250, size).astype(float)
    hardness = generator.normal(3.5, 0.6, size)
    more = 0.2 + 0.1 * (hardness - 3.5) + generator.normal(0, 0.05, size)
    return hardness * weights, (hardness + more) * weights, weights


def test_the_mean_of_all_items_is_their_own():
    whole, cut, weights = drawn(np.random.default_rng(0), 40)
    scores = Scores(cut, weights)
    assert scores.estimated_by(Scores(whole, weights)) == Estimate(scores.mean, scores.stderr)


def test_a_mean_of_some_items_is_moved_by_the_others():
    """By hand: the whole has 2 on all items and 3 on the one that was looked at, the cut 4."""
    whole = Scores(np.array([3.0, 1.0]), np.ones(2))
    cut = Scores(np.array([4.0, np.nan]), np.ones(2))
    assert cut.estimated_by(whole).mean == 2 + 1


def test_the_error_is_that_of_many_draws():
    """The error that is told is how far the estimates of new texts are from one another."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        whole, cut, weights = drawn(generator, 160)
        some = np.where(np.arange(160) < 64, cut, np.nan)
        found.append(Scores(some, weights).estimated_by(Scores(whole, weights)))
    means, errors = np.array([(one.mean, one.stderr) for one in found]).T
    assert means.mean() == pytest.approx(3.7, abs=0.01)
    assert means.std() == pytest.approx(errors.mean(), rel=0.05)
    alone = Scores(some, weights)
    assert errors.mean() < 0.75 * alone.stderr


# Differences of scores that do not weigh alike: as the repetition of two models' own words.
def unequal(generator, size):
    """Two scores of the same items that hang together, of other weights."""
    hardness = generator.normal(2, 0.5, size)
    found = []
    for rate in (1.0, 1.3):
        weights = generator.integers(1, 60, size).astype(float)
        found.append(Scores(weights * rate * hardness + generator.normal(0, 1, size), weights))
    return found


def plain_difference(one, other):
    """The mean, and by the delta method its error, item by item."""
    size = len(one.sums)
    first, second = (each.sums.sum() / each.weights.sum() for each in (one, other))
    squares = 0.0
    for i in range(size):
        a = (one.sums[i] - first * one.weights[i]) / one.weights.sum()
        b = (other.sums[i] - second * other.weights[i]) / other.weights.sum()
        squares += (a - b) ** 2
    return first - second, (squares * size / (size - 1)) ** 0.5


def test_a_difference_of_unequal_weights_is_that_of_two_ratios():
    one, other = unequal(np.random.default_rng(2), 50)
    found = one.minus(other)
    assert (found.mean, found.stderr) == pytest.approx(plain_difference(one, other), rel=1e-12)
    assert found.num_items == 50
    back = other.minus(one)
    assert (back.mean, back.stderr) == pytest.approx((-found.mean, found.stderr), rel=1e-12)


def test_the_error_of_a_difference_of_ratios_is_that_of_a_jackknife_and_of_many_draws():
    generator = np.random.default_rng(3)
    one, other = unequal(generator, 400)
    left_out = []
    for i in range(400):
        rest = np.arange(400) != i
        first, second = (Scores(each.sums[rest], each.weights[rest]) for each in (one, other))
        left_out.append(first.mean - second.mean)
    jackknife = (399 / 400 * ((left_out - np.mean(left_out)) ** 2).sum()) ** 0.5
    assert one.minus(other).stderr == pytest.approx(jackknife, rel=0.01)
    draws = [first.minus(second) for first, second in (unequal(generator, 80) for _ in range(2000))]
    errors = np.mean([each.stderr for each in draws])
    assert np.std([each.mean for each in draws]) == pytest.approx(errors, rel=0.05)


def test_a_difference_of_equal_weights_has_the_bits_that_it_always_had():
    """A ratio of the differences: it holds where the weights are one array, or equal."""
    generator = np.random.default_rng(4)
    whole, cut, weights = drawn(generator, 37)
    difference = cut - whole
    total = math.fsum(weights)
    mean = math.fsum(difference) / total
    squares = math.fsum((difference - mean * weights) ** 2)
    for of_cut in (weights, weights.copy()):
        found = Scores(cut, of_cut).minus(Scores(whole, weights))
        assert (found.mean, found.stderr) == (mean, math.sqrt(squares * 37 / 36) / total)


def test_items_that_one_has_not_are_left_out_of_a_difference_of_ratios():
    one, other = unequal(np.random.default_rng(5), 12)
    some = Scores(np.where(np.arange(12) < 7, one.sums, np.nan), one.weights)
    found = some.minus(other)
    alone = [Scores(each.sums[:7], each.weights[:7]) for each in (one, other)]
    assert (found.mean, found.stderr) == pytest.approx(plain_difference(*alone), rel=1e-12)
    assert found.num_items == 7


def test_a_difference_of_what_counts_nothing_is_none():
    nothing, some = Scores(np.zeros(3), np.zeros(3)), Scores(np.ones(3), np.ones(3))
    for one, other in ((nothing, some), (some, nothing), (nothing, nothing)):
        found = one.minus(other)
        assert math.isnan(found.mean)
        assert found.tied
        plain = found.to_json()
        assert (plain["mean"], plain["stderr"]) == (None, None)
        assert math.isnan(Difference.from_json(plain).mean)
    single = Scores(np.ones(1), np.ones(1)).minus(Scores(np.ones(1), np.full(1, 2.0)))
    assert single.mean == 0.5
    assert math.isnan(single.stderr)
