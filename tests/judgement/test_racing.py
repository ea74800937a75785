"""Races of cuts: the winner against that of a full evaluation."""

import numpy as np
import pytest
from scipy import optimize, special, stats

from shallower.judgement.judges.judge import FIRST_LOOK, LossJudge, looks
from shallower.judgement.racing import ALPHA, common_variance, lost, race
from shallower.judgement.trials import Trials
from shallower.models.layerwise import Layerwise
from shallower.results.scores import Scores
from tests.conftest import mostly_slow, tiny_llama
from tests.judgement.test_trials import batches


class Table:
    """Trials whose scores are known: cut k drops layer k."""

    def __init__(self, sums, weights, divided):
        self.sums, self.weights, self.divided = sums, weights, divided
        self.num_looks = len(divided)
        self.judged = np.zeros(len(sums), dtype=int)

    def path(self, dropped):
        return tuple(layer for layer in range(len(self.sums)) if layer not in dropped)

    def judge_together(self, cuts, looks=None):
        pass

    def scores(self, dropped, looks=None):
        seen = np.full(self.sums.shape[1], np.nan)
        for part in self.divided[: self.num_looks if looks is None else looks]:
            (cut,) = dropped
            seen[part] = self.sums[cut, part]
            self.judged[cut] = max(self.judged[cut], part.stop)
        return Scores(seen, self.weights)


def table(seed, *, num_cuts=12, num_items=32, gap=0.15):
    """Losses with effects of texts that all cuts share, and heavy tails of each."""
    random = np.random.default_rng(seed)
    weights = random.integers(50, 256, num_items).astype(float)
    worth = np.concatenate([[0], random.exponential(gap, num_cuts - 1)])[:, None]
    of_text = random.normal(0, 0.5, num_items)
    noise = 0.2 * random.standard_t(3, (num_cuts, num_items))
    return Table((4 + worth + of_text + noise) * weights, weights, looks(num_items, 8))


def full_winner(trials):
    return int(np.argmin(trials.sums.sum(axis=1)))


def share_lost(num_races, **options):
    """How often a race has another winner than a full evaluation, and the share of items seen."""
    wrong, seen = 0, 0.0
    for seed in range(num_races):
        trials = table(seed, **options)
        wrong += race(trials, [(k,) for k in range(len(trials.sums))]) != full_winner(trials)
        seen += trials.judged.mean() / trials.sums.shape[1]
    return wrong / num_races, seen / num_races


@pytest.mark.parametrize("gap", mostly_slow([0.0, 0.05, 0.3, 2.0], [0.05]))
def test_the_best_is_rarely_lost_with_heavy_tails(gap):
    # Of 400 races at a rate of 0.05, 28 or fewer go wrong in 97 of 100 tries.
    wrong, _ = share_lost(400, gap=gap)
    assert wrong <= stats.binom.ppf(0.97, 400, ALPHA) / 400


def test_the_best_is_rarely_lost_among_equals_of_a_few_items():
    wrong, _ = share_lost(400, gap=0.0, num_items=12, num_cuts=25)
    assert wrong <= ALPHA


def test_what_is_much_worse_is_judged_on_the_first_items_alone():
    wrong, seen = share_lost(50, gap=20.0)
    assert wrong == 0
    assert seen < 0.35


def test_a_level_of_nearly_one_does_lose_the_best():
    # The test above can fail: a bound without Student's quantile loses the best often.
    wrong = 0
    for seed in range(100):
        trials = table(seed, gap=0.02)
        found = race(trials, [(k,) for k in range(12)], alpha=40.0)
        wrong += found != full_winner(trials)
    assert wrong > 10


def test_of_equals_the_first_wins():
    sums = np.tile(np.arange(1.0, 17), (3, 1))
    trials = Table(sums, np.ones(16), looks(16, 8))
    assert race(trials, [(2,), (0,), (1,)]) == 0


def test_level_zero_judges_all_on_all_items():
    trials = table(0, gap=20.0)
    found = race(trials, [(k,) for k in range(12)], alpha=0)
    assert (trials.judged == 32).all()
    assert found == full_winner(trials)


def test_one_cut_is_not_judged_more_than_once():
    trials = table(0, num_cuts=1)
    assert race(trials, [(0,)]) == 0
    assert trials.judged[0] == FIRST_LOOK


def slow_common(variances, degrees):
    """Smyth's estimates, by a solver."""
    logs = np.log(variances)
    spread = np.var(logs, ddof=1) - special.polygamma(1, degrees / 2)
    unknown = lambda more: special.polygamma(1, more / 2) - spread  # noqa: E731
    more = 1000.0 if unknown(1000) > 0 else 0.1 if unknown(0.1) < 0 else None
    more = more or optimize.brentq(unknown, 0.1, 1000)
    logs = logs - special.digamma(degrees / 2) + np.log(degrees / 2)
    return more, np.exp(logs.mean() + special.digamma(more / 2) - np.log(more / 2))


def slow_lost(sums, weights, alpha):
    """The same rule, a pair at a time."""
    seen = np.isfinite(sums[0])
    degrees, unseen = seen.sum() - 1, 1 - weights[seen].sum() / weights.sum()
    cuts = [Scores(row, weights) for row in sums]
    best = min(cuts, key=lambda cut: cut.mean)
    variances = [cut.minus(best).stderr ** 2 for cut in cuts if cut is not best]
    more, common = slow_common(np.array(variances), degrees)
    quantile = stats.t.ppf(1 - alpha, degrees + more)
    worse = np.zeros(len(sums), dtype=bool)
    for number, cut in enumerate(cuts):
        for other in cuts:
            pair = cut.minus(other)
            variance = (more * common + degrees * pair.stderr**2) / (more + degrees)
            worse[number] |= pair.mean > quantile * np.sqrt(variance * unseen)
    return worse


@pytest.mark.parametrize("degrees", [1, 3, 15])
@pytest.mark.parametrize("more", [2.0, 10.0])
def test_the_common_variance_is_found_again(degrees, more):
    random = np.random.default_rng(0)
    true = 0.7 * more / random.chisquare(more, 10**6)
    found = common_variance(true * random.chisquare(degrees, 10**6) / degrees, degrees)
    assert found[0] == pytest.approx(more, rel=0.2)
    assert found[1] == pytest.approx(0.7, rel=0.1)
    drawn = true[:30] * random.chisquare(degrees, 30) / degrees
    assert common_variance(drawn, degrees) == pytest.approx(slow_common(drawn, degrees), rel=0.05)


def test_a_single_variance_has_nothing_in_common():
    assert common_variance(np.array([0.5]), 3) == (0, 0)
    assert common_variance(np.array([0.5, 0.0]), 3) == (0, 0)


@pytest.mark.parametrize("seen", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("alpha", [0.2, 0.001])
def test_the_rule_is_that_of_pairs(seen, alpha):
    trials = table(3, gap=0.4)
    sums = trials.sums.copy()
    sums[:, seen:] = np.nan
    expected = slow_lost(sums, trials.weights, alpha)
    assert np.array_equal(lost(sums, trials.weights, alpha), expected)
    assert not expected.all()


def test_a_single_item_loses_nobody():
    sums = np.array([[1.0, np.nan], [5.0, np.nan]])
    assert not lost(sums, np.ones(2), 0.05).any()


def test_real_trials_give_the_winner_of_all():
    trials = Trials(Layerwise(tiny_llama(6)), LossJudge(batches((4, 4, 8))))
    cuts = [(0, 1), (4,), (2, 3), (5,), (1, 3)]
    whole = [trials.scores(cut).mean for cut in cuts]
    assert race(trials, cuts, alpha=0) == int(np.argmin(whole))
    assert race(trials, cuts) == int(np.argmin(whole))
