"""Scores of some items: the mean over all is estimated from those of something else."""

import numpy as np
import pytest

from shallower.values.scores import Scores


def drawn(generator, size):
    """Sums and weights of items, of a model and of a cut that loses more on hard ones."""
    weights = generator.integers(20, 250, size).astype(float)
    hardness = generator.normal(3.5, 0.6, size)
    more = 0.2 + 0.1 * (hardness - 3.5) + generator.normal(0, 0.05, size)
    return hardness * weights, (hardness + more) * weights, weights


def test_the_mean_of_all_items_is_their_own():
    whole, cut, weights = drawn(np.random.default_rng(0), 40)
    scores = Scores(cut, weights)
    assert scores.estimated_by(Scores(whole, weights)) == (scores.mean, scores.stderr)


def test_a_mean_of_some_items_is_moved_by_the_others():
    """By hand: the whole has 2 on all items and 3 on the one that was looked at, the cut 4."""
    whole = Scores(np.array([3.0, 1.0]), np.ones(2))
    cut = Scores(np.array([4.0, np.nan]), np.ones(2))
    assert cut.estimated_by(whole)[0] == 2 + 1


def test_the_error_is_that_of_many_draws():
    """The error that is told is how far the estimates of new texts are from one another."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        whole, cut, weights = drawn(generator, 160)
        some = np.where(np.arange(160) < 64, cut, np.nan)
        found.append(Scores(some, weights).estimated_by(Scores(whole, weights)))
    means, errors = np.array(found).T
    assert means.mean() == pytest.approx(3.7, abs=0.01)
    assert means.std() == pytest.approx(errors.mean(), rel=0.05)
    alone = Scores(some, weights)
    assert errors.mean() < 0.75 * alone.stderr
