"""Positions: the tokens of a text that are compared; the last, the last few, some, or all.

Tokens are counted from 0 among those that are no padding.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import PositionsError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_COUNT = 2**20
"""The tokens of one text that the core's exact sums have room for."""

GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Positions:
    """A choice of tokens, made of each text alone: batches, shards and resuming do not matter.

    Attributes:
        kind: ``last``, ``random`` or ``all``.
        count: tokens of a text at most; 0 for ``all``.
        seed: of ``random``, 0 to 2**64 - 1; 0 for the others.

    Raises:
        PositionsError: there is no such choice.
    """

    kind: str = "last"
    count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        counted = self.kind in ("last", "random") and 1 <= self.count <= MAX_COUNT
        if not counted and (self.kind, self.count) != ("all", 0):
            raise PositionsError(
                f"no positions {self.kind}:{self.count}: expected last, last:K, random:K or all, "
                f"K from 1 to {MAX_COUNT}"
            )
        if not 0 <= self.seed < 2**64:
            raise PositionsError(f"seed = {self.seed}: expected 0 to 2**64 - 1")
        if self.seed and self.kind != "random":
            raise PositionsError(f"positions {self} take no seed")

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "Positions":
        """Read ``last``, ``last:K``, ``random:K`` or ``all``; ``seed`` is of ``random:K`` alone.

        PositionsError: the text names no choice, or the seed is out of range.
        """
        match = re.fullmatch(r"(last|random|all)(?::(\d{1,9}))?", text, re.ASCII)
        kind, count = match.groups() if match else ("", None)
        if not match or ((kind == "all") != (count is None) and text != "last"):
            raise PositionsError(
                f"no positions {text!r}: expected last, last:K, random:K or all, K from 1 to "
                f"{MAX_COUNT}"
            )
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise PositionsError(f"seed = {seed!r}: expected an integer, 0 to 2**64 - 1")
        number = int(count) if count else int(kind == "last")
        return cls(kind, number, seed if kind == "random" else 0)

    def __str__(self) -> str:
        name = self.kind if self.count in (0, 1) and self.kind != "random" else None
        return name or f"{self.kind}:{self.count}" + (f", seed {self.seed}" if self.seed else "")

    @property
    def one_a_text(self) -> bool:
        """True where no text can have more than one token."""
        return self.count == 1

    def chosen(self, num_tokens: int, text: int) -> "NDArray[np.int64]":
        """Choose tokens of one text: ascending indices, (K,) int64; all of a text that has fewer.

        ``num_tokens`` counts those that are no padding; the number of the ``text`` among all
        decides ``random``.
        """
        import numpy as np  # here alone: a cut on disk, which has positions in its plan, needs none

        if self.kind == "all" or self.count >= num_tokens:
            return np.arange(num_tokens)
        if self.kind == "last":
            return np.arange(num_tokens - self.count, num_tokens)
        seed, index = (np.array([number], np.uint64) for number in (self.seed, text))
        step = np.uint64(GAMMA)
        start = _mixed(_mixed(seed) + index * step)
        keys = _mixed(start + np.arange(1, num_tokens + 1, dtype=np.uint64) * step)
        return np.sort(np.argsort(keys, kind="stable")[: self.count])


def _mixed(states: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    """The output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    import numpy as np

    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))
