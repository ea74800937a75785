"""Resamples of the samples behind costs: how stable the best start of a block is.

Sees the core, which draws and sums; the answer depends on no thread and on no order of samples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import ScanError

MAX_RESAMPLES = 2**31

NUM_RESAMPLES = 1000
"""Resamples by which a page says how stable l* is."""


@dataclass(frozen=True, slots=True, eq=False)
class BootstrappedStart:
    """Stability of the best start of one block size over resamples.

    Attributes:
        start: l*(n), the start of the best block over all samples.
        probability: the share of resamples in which the best block starts there as well. It says
            how stable the choice is under other samples of the same kind; it is not the
            probability that the start is the true one.
        distribution: (L-n+1,) float64, the share of resamples that each start wins; their sum
            is 1.
    """

    start: int
    probability: float
    distribution: NDArray[np.float64]


def resampled_wins(
    samples: NDArray[np.float32],
    num_resamples: int,
    seed: int,
    *,
    num_states: int,
    threads: int | None,
    more_is_better: bool,
) -> list[list[int]]:
    """Count how often each start is the best when samples are drawn again with replacement.

    ``samples`` are (S, L(L+1)/2) float32, the values of all pairs (l, m), l < m, row by row;
    ``more_is_better`` says that they are similarities, not costs. For every block size ``n`` in ``1
    .. L-1`` the (L-n+1) counts. ScanError: there are fewer than two samples; a number is out of
    range; a sample's value is NaN or infinite. ThreadsError: ``threads`` is out of range.
    """
    for name, value, least, most in (
        ("num_resamples", num_resamples, 1, MAX_RESAMPLES),
        ("seed", seed, 0, 2**64 - 1),
    ):
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not least <= value <= most:
            raise ScanError(f"{name} = {value!r}: expected an integer, {least} to {most}")
    pool = _core.Threads(threads)
    if len(samples) < 2:
        raise ScanError("a single sample cannot be resampled: scan at least 2")
    return _core.bootstrap(
        samples, num_states, num_resamples, seed, pool, more_is_better=more_is_better
    )
