"""Races: of several cuts the best one, without judging all of them on all items.

A few texts give a poor estimate of one variance; many cuts on the same texts give a good one of
what their variances have in common. So variances are moderated (:func:`lost`).
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, polygamma, stdtrit

from .trials import Trials

ALPHA = 0.05
"""Probability with which the cut that is best on all items is lost on the way, at most."""


def race(trials: Trials, cuts: Sequence[Iterable[int]], *, alpha: float = ALPHA) -> int:
    """Find the best of several cuts, dropping at each look those that are worse (:func:`lost`).

    It is the one of the least mean, of equals the first. The best on all items wins with a
    probability of at least ``1 - alpha``; 0 judges all cuts on all items.
    """
    dropped = [frozenset(cut) for cut in cuts]
    order = sorted(range(len(cuts)), key=lambda number: trials.path(dropped[number]))
    scores = [trials.scores((), looks=0)] * len(cuts)
    left = list(range(len(cuts)))
    for look in range(1, trials.num_looks + 1):
        running = [number for number in order if number in left]
        trials.judge_together([dropped[number] for number in running], look)
        for number in running:
            scores[number] = trials.scores(dropped[number], looks=look)
        if alpha and look < trials.num_looks:
            share = alpha / ((trials.num_looks - 1) * max(1, len(cuts) - 1))
            worse = lost(np.array([scores[n].sums for n in left]), scores[left[0]].weights, share)
            left = [number for number, gone in zip(left, worse, strict=True) if not gone]
        if len(left) == 1:
            break
    means = [scores[number].mean for number in left]
    return left[int(np.argmin(means))]


def lost(
    sums: NDArray[np.float64], weights: NDArray[np.float64], alpha: float
) -> NDArray[np.bool_]:
    """Find the cuts that are worse than another one on the items seen, by more than chance.

    Of the cuts b and j and s items of S, with the difference ``d`` of their means and its paired
    variance ``v`` (both as of ratios), b is lost if ``d > t · sqrt(v' · (1 - f))``. The variance
    is moderated, ``v' = (d0 · v0 + (s-1) · v) / (d0 + s-1)``, with what the variances of all cuts
    have in common (:func:`common_variance`; Smyth 2004), t is Student's quantile at ``1 - alpha``
    for ``d0 + s - 1`` degrees of freedom, and f the share of the items that were seen, by weight.
    ``1 - f`` corrects for a finite population (Cochran, Sampling Techniques, §2.6): what is
    estimated is the mean over the S items, in whose order there is no system.

    ``sums`` are (K, S) over the items, NaN for those that were not seen, the same of all cuts;
    ``weights`` (S,) what the items count; ``alpha`` is of a single comparison. The result, (K,), is
    true for the lost; one is left at least.
    """
    seen = np.isfinite(sums).all(axis=0)
    sums, counts, degrees = sums[:, seen], weights[seen], int(seen.sum()) - 1
    if degrees < 1:
        return np.zeros(len(sums), dtype=bool)
    total = counts.sum()
    means = sums.sum(axis=1) / total
    # The variances of the differences of all pairs, (K, K), from the products of all deviations.
    deviations = sums - means[:, None] * counts
    products = deviations @ deviations.T
    squares = np.diag(products)
    pairs = np.maximum(squares[:, None] + squares - 2 * products, 0)
    variances = pairs * (degrees + 1) / degrees / total**2
    best = int(np.argmin(means))
    more, common = common_variance(np.delete(variances[best], best), degrees)
    variances = (more * common + degrees * variances) / (more + degrees)
    bound = stdtrit(more + degrees, 1 - alpha) * np.sqrt(
        variances * max(0.0, 1 - total / weights.sum())
    )
    worse: NDArray[np.bool_] = (means[:, None] - means > bound).any(axis=1)
    worse[best] = False
    return worse


def common_variance(variances: NDArray[np.float64], degrees: int) -> tuple[float, float]:
    """Estimate d0 and v0 of the distribution ``v0 d0 / chi²(d0)`` of variances (Smyth 2004, §6.2).

    The logarithms of estimates with ``degrees`` have the variance ``trigamma(degrees/2) +
    trigamma(d0/2)``. d0 is 0 for fewer than two estimates, else 0.1 to 1000.
    """
    logs = np.log(variances[variances > 0])
    if len(logs) < 2:
        return 0.0, 0.0
    spread = np.var(logs, ddof=1) - polygamma(1, degrees / 2)
    fitting = int((polygamma(1, _DEGREES / 2) >= spread).sum())
    more = float(_DEGREES[max(0, fitting - 1)])
    shift = digamma(more / 2) - np.log(more / 2) - digamma(degrees / 2) + np.log(degrees / 2)
    return more, float(np.exp(logs.mean() + shift))


_DEGREES = np.geomspace(0.1, 1000, 400)
