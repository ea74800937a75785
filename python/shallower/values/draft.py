"""Draft: what a cut brings as a draft of its own parent, in speculative decoding (2211.17192)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LONGEST = 16
"""Tokens of a draft, at most."""

WORTHWHILE = 1.25
"""The speed-up from which on a draft is called worthwhile."""


def speedup(acceptance: float, cost: float, length: int) -> float:
    """Expect a speed-up by drafts of so many tokens (Leviathan et al., 2211.17192, theorem 3.8).

    A forward of the whole model yields (1 - α^(γ+1)) / (1 - α) = Σ α^i tokens, 0 <= i <= γ, and
    takes with its draft γ c + 1 times the time of a token of the whole model alone.

    Args:
        acceptance: α, the share of a draft's tokens that the whole model accepts, 0 to 1, each of
            them with the same probability.
        cost: c, the time of a token of the draft by that of one of the whole model.
        length: γ, tokens of a draft; without one, 0, the speed-up is 1.

    Returns:
        Tokens a second with drafts, by those without.
    """
    return sum(acceptance**token for token in range(length + 1)) / (length * cost + 1)


def best_length(acceptance: float, cost: float) -> int:
    """Choose the tokens of a draft, 1 to 16, that speed up most; 0 where no length does."""
    length = max(range(1, LONGEST + 1), key=lambda tokens: speedup(acceptance, cost, tokens))
    return length if speedup(acceptance, cost, length) > 1 else 0


def acceptance_for(wanted: float, cost: float) -> float | None:
    """Find the least acceptance at which drafts of 1 to 16 tokens speed up ``wanted`` times.

    ``wanted`` is above 1. None where no acceptance does.
    """

    def is_enough(acceptance: float) -> bool:
        return speedup(acceptance, cost, best_length(acceptance, cost)) >= wanted

    return _least(is_enough) if is_enough(1.0) else None


def _least(holds: Callable[[float], bool]) -> float:
    """The least of the numbers from 0 to 1 for which holds what holds for all above it, and 1."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class Draft:
    """A cut as a draft of its own parent: what it costs, and what it brings.

    Attributes:
        cost: the time of a token of the draft, as a share of that of one of the whole model.
        acceptance: the share of its tokens that the whole model accepts, 0 to 1; None where it is
            not known.
        acceptance_stderr: its standard error; None where it is not known.
    """

    cost: float
    acceptance: float | None = None
    acceptance_stderr: float | None = None

    @property
    def break_even(self) -> float | None:
        """The acceptance above which a length of 1 to 16 speeds up: the cost; None if none does.

        Σ α^i <= γ α for 1 <= i <= γ, so no length pays up to α = c, and one token does above it.
        """
        return self.cost if self.cost < 1 else None

    @property
    def worthwhile(self) -> float | None:
        """The least acceptance at which the best length speeds up 1.25 times; None if none does."""
        return acceptance_for(WORTHWHILE, self.cost)

    @property
    def length(self) -> int | None:
        """The tokens of a draft, 1 to 16, that speed up most; 0 where none does: no draft."""
        return None if self.acceptance is None else best_length(self.acceptance, self.cost)

    @property
    def speedup(self) -> float | None:
        """The expected speed-up by drafts of the best length; 1 without any."""
        if self.acceptance is None:
            return None
        return speedup(self.acceptance, self.cost, best_length(self.acceptance, self.cost))

    @property
    def speedup_stderr(self) -> float | None:
        """The error of the speed-up by that of the acceptance, at the best length."""
        if self.acceptance is None or self.acceptance_stderr is None:
            return None
        length = best_length(self.acceptance, self.cost)
        slope = sum(token * self.acceptance ** (token - 1) for token in range(1, length + 1))
        return slope / (length * self.cost + 1) * self.acceptance_stderr

    def to_json(self) -> dict[str, Any]:
        """Give what is known and what follows from it as plain JSON values."""
        names = ("cost", "break_even", "worthwhile", "length", "speedup", "speedup_stderr")
        return {name: getattr(self, name) for name in names}
