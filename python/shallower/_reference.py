"""The core's mathematics in plain NumPy float64: slow, plain, and the oracle of the tests.

For a sample with states x^(0) .. x^(L), rows of an array of shape (L+1, D):

    cosine(l, m)  = x^(l)·x^(m) / (|x^(l)| |x^(m)|)
    angular(l, m) = arccos(cosine(l, m)) / pi                      (2403.17887, eq. 7)
    l*(n)         = argmin over l in 0..L-n of mean angular(l, l+n)  (eq. 6)

The angle is taken by its chord, 2·arcsin(|u - v| / 2) for unit vectors u and v, another
formula than the core's.
"""

from itertools import combinations

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


METRICS = {"angular": angular, "cosine": cosine}


def mean_and_stderr(states: NDArray[np.floating], metric: str) -> tuple[Matrix, Matrix]:
    """Mean and standard error over samples: states (S, L+1, D) to two (L+1, L+1)."""
    values = np.stack([METRICS[metric](sample) for sample in states])
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


def best_start(mean: Matrix, n: int) -> int:
    """``l*(n)`` from mean distances (L+1, L+1); the smallest of equals."""
    num_layers = len(mean) - 1
    return int(np.argmin([mean[start, start + n] for start in range(num_layers - n + 1)]))


def best_plan(
    cost: Matrix, n: int, max_blocks: int, protect_first: int = 0, protect_last: int = 0
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
