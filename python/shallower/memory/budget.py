"""One bound for the cached hidden states of a process, not for forwards (``memory/plan.py``).

It is half of the memory free when the first store begins, or of a limit. Each store gets half of
what is left, and gives it back when it is gone.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..models.architecture import swapped
from .device import available_bytes, device_room

SHARE = 0.5
"""Of the memory that is free, or of the limit, for all stores together."""


class Budget:
    """Bytes that stores of states divide among themselves, for as long as each of them lives."""

    def __init__(self) -> None:
        self.bound: int | None = None
        self._total = 0
        self._held: dict[int, int] = {}

    @property
    def left(self) -> int:
        """Bytes that no store holds."""
        free = self._free()
        total = self._total if self.bound is None else int(SHARE * self.bound)
        # What a store was given, but has not filled, is still free: so this may be too much.
        return max(0, min(total - sum(self._held.values()), free))

    def _free(self) -> int:
        """The share of what is free now; it is for all stores while none of them has begun."""
        free = int(SHARE * available_bytes(torch.device("cpu")))
        if not self._held:
            self._total = free
        return free

    def share(self, store: object) -> int:
        """Give a store half of what is left, and the number of those bytes."""
        size = self.left // 2
        self.hold(store, size)
        return size

    def reserve(self, store: object, size: int) -> bool:
        """Give a store ``size`` bytes, or none where fewer are left."""
        fits = size <= self.left
        if fits:
            self.hold(store, size)
        return fits

    def hold(self, store: object, size: int) -> None:
        """Count bytes that a store needs in any case, whether they are left or not."""
        key = id(store)
        if not self._held:
            self._free()
        if key not in self._held:
            weakref.finalize(store, self._held.pop, key, None)
        self._held[key] = self._held.get(key, 0) + size


BUDGET = Budget()
"""That of this process."""


@contextmanager
def limit(size: str | int | None) -> Iterator[None]:
    """Bound what is cached and planned with in the body, in bytes or as ``4GB``; or by nothing."""
    bound = BUDGET.bound if size is None else device_room(size).size
    with swapped(BUDGET, bound=bound):
        yield
