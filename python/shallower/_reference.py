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
    """How far each state is from an earlier one, in the earlier one's norm; mirrored."""
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


def best_start(mean: Matrix, n: int) -> int:
    """``l*(n)`` from mean distances (L+1, L+1); the smallest of equals."""
    num_layers = len(mean) - 1
    return int(np.argmin([mean[start, start + n] for start in range(num_layers - n + 1)]))
