"""The core's mathematics in plain NumPy float64: slow, plain, and the oracle of the tests.

For a sample with states x^(0) .. x^(L), rows of an array of shape (L+1, D):

    cosine(l, m)  = x^(l)·x^(m) / (|x^(l)| |x^(m)|)
    angular(l, m) = arccos(cosine(l, m)) / pi                      (2403.17887, eq. 7)
    l*(n)         = argmin over l in 0..L-n of mean angular(l, l+n)  (eq. 6)

    relative_l2(l, m) = |x^(m) - x^(l)| / |x^(l)|,  l < m
    norm_ratio(l, m)  = |x^(m)| / |x^(l)|,          l < m

The last two are of a later state relative to an earlier one; their matrices are mirrored.
The angle is taken by its chord, 2·arcsin(|u - v| / 2) for unit vectors u and v, another
formula than the core's.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, groupby

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def angular(states: NDArray[np.floating]) -> Matrix:
    """Angular distances of one sample: states (L+1, D) to (L+1, L+1)."""
    rows = states.astype(np.float64)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    chords = np.linalg.norm(units[:, None, :] - units[None, :, :], axis=2)
    return 2 * np.arcsin(np.minimum(chords / 2, 1)) / np.pi


def cosine(states: NDArray[np.floating]) -> Matrix:
    """Cosine similarities of one sample: states (L+1, D) to (L+1, L+1)."""
    rows = states.astype(np.float64)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units @ units.T


def relative_l2(states: NDArray[np.floating]) -> Matrix:
    """Distance of each state from an earlier one, in the earlier one's norm; mirrored."""
    rows = states.astype(np.float64)
    differences = np.linalg.norm(rows[:, None, :] - rows[None, :, :], axis=2)
    return _mirrored(differences / np.linalg.norm(rows, axis=1)[:, None], 0)


def norm_ratio(states: NDArray[np.floating]) -> Matrix:
    """The norm of each state over that of an earlier one; mirrored."""
    norms = np.linalg.norm(states.astype(np.float64), axis=1)
    return _mirrored(norms[None, :] / norms[:, None], 1)


def _mirrored(values: Matrix, diagonal: float) -> Matrix:
    upper = np.triu(values, 1)
    return upper + upper.T + diagonal * np.eye(len(values))


def norms(states: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean norms over samples: states (S, L+1, D) to (L+1,)."""
    return np.linalg.norm(states.astype(np.float64), axis=2).mean(axis=0)


METRICS = {
    "angular": angular,
    "cosine": cosine,
    "relative_l2": relative_l2,
    "norm_ratio": norm_ratio,
}


def mean_and_stderr(states: NDArray[np.floating], metric: str) -> tuple[Matrix, Matrix]:
    """Mean and standard error over samples: states (S, L+1, D) to two (L+1, L+1)."""
    values = np.stack([METRICS[metric](sample) for sample in states])
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


def clustered(
    states: NDArray[np.floating], metric: str, sequences: Sequence[int]
) -> tuple[Matrix, Matrix]:
    """Mean over samples and its standard error over sequences of neighbours: as above.

    The mean is a ratio of two sums over sequences, that of values and that of lengths.
    """
    values = np.stack([METRICS[metric](sample) for sample in states])
    runs = [list(run) for _, run in groupby(range(len(values)), lambda i: sequences[i])]
    mean, count = values.mean(axis=0), len(runs)
    residuals = np.stack([(values[run] - mean).sum(axis=0) for run in runs])
    variance = count / (count - 1) * (residuals**2).sum(axis=0) / len(values) ** 2
    return mean, np.sqrt(variance)


def exact_variance(values: Sequence[Fraction], sequences: Sequence[int]) -> Fraction:
    """The variance between sequences of one pair's values: squared error times sequences."""
    runs = [list(run) for _, run in groupby(range(len(values)), lambda i: sequences[i])]
    mean, length = Fraction(sum(values), len(values)), Fraction(len(values), len(runs))
    residuals = [sum((values[i] - mean for i in run), Fraction(0)) for run in runs]
    return sum(((r / length) ** 2 for r in residuals), Fraction(0)) / (len(runs) - 1)


def best_start(mean: Matrix, n: int) -> int:
    """``l*(n)`` from mean distances (L+1, L+1); the smallest of equals."""
    num_layers = len(mean) - 1
    return int(np.argmin([mean[start, start + n] for start in range(num_layers - n + 1)]))


def is_settled(
    values: Matrix, error: float, *, tolerance: float, exact: bool = False, most: float = 1.0
) -> bool:
    """Whether the leader of (S, K) distances is shown to exceed no rival beyond the tolerance.

    From 64 samples on by the one-sided bound of 2103.06476; or ``exact`` by bets (2010.09686), for
    distances that differ by ``most`` at the most.
    """
    leader = int(np.argmin([math.fsum(column) for column in values.T]))
    error /= values.shape[1] - 1
    rivals = np.delete(values, leader, axis=1).T
    if exact:
        return all(
            _wealth([float(one) for one in values[:, leader] - rival], tolerance, most) >= 1 / error
            for rival in rivals
        )
    return len(values) >= 64 and all(
        _upper_bound(values[:, leader] - rival, error) <= tolerance for rival in rivals
    )


def _upper_bound(excess: Matrix, error: float) -> float:
    """Of the mean of samples, at any number of them, narrowest around 256."""
    count = len(excess)
    rho2 = (-2 * math.log(error) + math.log(-2 * math.log(error) + 1)) / 256
    inside = 2 * (count * rho2 + 1) / (count**2 * rho2)
    margin = inside * math.log(1 + math.sqrt(count * rho2 + 1) / (2 * error))
    return float(excess.mean() + excess.std(ddof=1) * math.sqrt(margin))


def _wealth(excess: Sequence[float], tolerance: float, most: float) -> float:
    """What six gamblers own who bet that the excess is less, with 1 in all to begin with."""
    total = 0.0
    for gambler, money in enumerate([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32]):
        bet = 0.5**gambler / (most - tolerance)
        total += money * math.prod(1 + bet * (tolerance - one) for one in excess)
    return total


def best_plan(
    cost: Matrix, n: int, max_blocks: int, *, protect_first: int = 0, protect_last: int = 0
) -> list[tuple[int, int]]:
    """The cheapest blocks (start, stop) of ``n`` layers together, by trying all of them.

    ``cost`` is (L+1, L+1), ``[start, stop]`` the cost of a block. Of equals: fewer blocks,
    then the smaller starts, then the smaller stops.
    """
    num_layers = len(cost) - 1
    layers = range(protect_first, num_layers - protect_last)
    plans = []
    for dropped in combinations(layers, n):
        starts = [layer for layer in dropped if layer - 1 not in dropped]
        stops = [layer + 1 for layer in dropped if layer + 1 not in dropped]
        blocks = list(zip(starts, stops, strict=True))
        if len(blocks) <= max_blocks:
            plans.append((sum(cost[block] for block in blocks), len(blocks), blocks))
    return min(plans)[2]


GAMMA = 0x9E3779B97F4A7C15


def split_mix(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))


def resample(num_samples: int, seed: int, resample: int) -> NDArray[np.int64]:
    """The (S,) samples that are drawn by resample 0, 1, ..., each uniform in 0 .. S-1."""
    start = np.array([(seed + (resample + 1) * GAMMA) % 2**64], dtype=np.uint64)
    steps = np.arange(1, num_samples + 1, dtype=np.uint64) * np.uint64(GAMMA)
    random = split_mix(split_mix(start) + steps)
    half, size = np.uint64(32), np.uint64(num_samples)
    low = ((random & np.uint64(2**32 - 1)) * size) >> half
    return (((random >> half) * size + low) >> half).astype(np.int64)


def integer_costs(values: NDArray[np.float32], similarity: bool) -> Matrix:
    """The values (S, P) of samples as integers below 2**29, the samples in their order."""
    ordered = values[np.lexsort(values.T[::-1])].astype(np.float64)
    _, exponent = np.frexp(np.abs(ordered).max())
    return np.rint(ordered * 2.0 ** (29 - int(exponent))) * (-1 if similarity else 1)


def wins(sums: Matrix) -> list[NDArray[np.int64]]:
    """Count how often each start has the least sum, for every n: sums (R, L(L+1)/2)."""
    num_states = round((1 + np.sqrt(1 + 8 * sums.shape[1])) / 2)
    first, second = np.triu_indices(num_states, 1)
    counts = []
    for n in range(1, num_states - 1):
        best = sums[:, second - first == n].argmin(axis=1)
        counts.append(np.bincount(best, minlength=num_states - n))
    return counts


def bootstrap(
    values: NDArray[np.float32], num_resamples: int, seed: int, *, similarity: bool
) -> list[NDArray[np.int64]]:
    """Count how often each start is best, for every n: values (S, L(L+1)/2), up to 2**23 samples.

    Weighted sums of integers, which float64 holds exactly.
    """
    weights = np.empty((num_resamples, len(values)))
    for index in range(num_resamples):
        drawn = resample(len(values), seed, index)
        weights[index] = np.bincount(drawn, minlength=len(values))
    return wins(weights @ integer_costs(values, similarity))


def hsic(first: Matrix, second: Matrix) -> float:
    """The unbiased HSIC_1 of two Gram matrices (m, m), m > 3 (2010.15327, eq. 2)."""
    size = len(first)
    left, right = (matrix - np.diag(np.diagonal(matrix)) for matrix in (first, second))
    product = left @ right
    total = np.trace(product) + left.sum() * right.sum() / ((size - 1) * (size - 2))
    return float(total - 2 * product.sum() / (size - 2)) / (size * (size - 3))


def cka(states: NDArray[np.floating], batch: int) -> Matrix:
    """Linear CKA from minibatches (2010.15327, eq. 3): states (S, L+1, D) to (L+1, L+1)."""
    num_states = states.shape[1]
    sums = np.zeros((num_states, num_states))
    for start in range(0, len(states) - 3, batch):
        rows = states[start : start + batch].astype(np.float64)
        rows = rows - rows.mean(axis=0)  # HSIC stays; digits are not lost to a common offset
        grams = np.einsum("ild,jld->lij", rows, rows)
        sums += [[hsic(first, second) for second in grams] for first in grams]
    norms = np.sqrt(np.diagonal(sums))
    return sums / norms / norms[:, None]
