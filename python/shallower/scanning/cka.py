"""CkaBatches: the minibatches of samples that linear CKA is summed over."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import Cka, Threads
from ..errors import StatesError

MIN_BATCH, MAX_BATCH = 4, 1024


def check_batch(size: int) -> None:
    """Refuse a size of minibatches, in samples, that is not an integer from 4 to 1024.

    StatesError.
    """
    is_integer = isinstance(size, int) and not isinstance(size, bool)
    if not is_integer or not MIN_BATCH <= size <= MAX_BATCH:
        raise StatesError(f"cka_batch = {size!r}: expected an integer, {MIN_BATCH} to {MAX_BATCH}")


class CkaBatches:
    """Accepted samples cut, in the order they come, into minibatches for the core.

    Where the batches of the caller end does not matter. At most one minibatch waits, as a copy.
    """

    def __init__(self, num_states: int, size: int, threads: Threads) -> None:
        self._core = Cka(num_states, size)
        self._threads = threads
        self._waiting: list[NDArray[Any]] = []

    def add(self, states: NDArray[Any], rejected: Sequence[int]) -> None:
        """Take the samples of (B, L+1, D) but the ``rejected`` ones, whose indices ascend."""
        accepted = np.delete(np.arange(len(states)), rejected)
        while len(accepted):
            room = self._core.batch_size - sum(map(len, self._waiting))
            taken, accepted = accepted[:room], accepted[room:]
            whole = taken[-1] - taken[0] + 1 == len(taken)
            part = states[taken[0] : taken[-1] + 1] if whole else states[taken]
            if len(taken) < room:
                self._waiting.append(part.copy())
            else:
                self._flush(part)

    def finish(self) -> Cka:
        """The sums of all minibatches; a last one counts if it has at least 4 samples."""
        if sum(map(len, self._waiting)) >= MIN_BATCH:
            self._flush(self._waiting.pop())
        return self._core

    def _flush(self, last: NDArray[Any]) -> None:
        batch = np.concatenate([*self._waiting, last]) if self._waiting else last
        self._core.update(np.require(batch, requirements=["C", "A"]), self._threads)
        self._waiting.clear()
