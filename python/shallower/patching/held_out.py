"""Linear maps chosen by held-out tokens: their penalty, and what the first tokens count.

A choice takes a solution of the equations and its errors on some thousand rows that are kept: no
layer runs, and no loss is measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .least_squares import ROWS, NormalEquations

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties on the change of a matrix, as shares of its inputs' mean square, ascending."""

FIRST_RIDGE = 0.1
"""The penalty that is tried first; its neighbours follow, as long as one of them is better."""


@dataclass(slots=True)
class Rows:
    """Some tokens: the inputs of a map and its targets.

    Attributes:
        parts: inputs (N, F) and targets (N, D), batch by batch.
        reached: the sum of squares of the states that the targets lead to.
    """

    parts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    reached: float = 0.0

    def error(self, solution: torch.Tensor | None = None) -> float:
        """Measure a map.

        Args:
            solution: (D, F); None for no map at all.

        Returns:
            The sum of its squared errors.
        """
        total = 0.0
        for inputs, targets in self.parts:
            left = targets.float()
            if solution is not None:
                turned = solution.float().T
                pieces = zip(inputs.split(ROWS), left.split(ROWS), strict=True)
                left = torch.cat([r - x.float() @ turned for x, r in pieces])
            total += float(left.double().square().sum())
        return total


@dataclass(slots=True)
class HeldOut:
    """Held-out tokens, the first ones of the texts apart.

    Attributes:
        others: all tokens but those.
        firsts: the first tokens, which carry massive activations.
    """

    others: Rows = field(default_factory=Rows)
    firsts: Rows = field(default_factory=Rows)

    def relative_error(self, solution: torch.Tensor) -> float:
        """Measure a map by its squared errors as shares of the states' squares.

        Norms stand before all that read the stream, so that an error counts by its share. Every
        token reads the first one: all of them together count as much as all others.

        Args:
            solution: (D, F).

        Returns:
            The sum of both shares; infinity where it is not finite.
        """
        kinds = self.others, self.firsts
        total = sum(rows.error(solution) / rows.reached for rows in kinds if rows.reached)
        return total if math.isfinite(total) else math.inf

    def mapped(self, matrix: torch.Tensor) -> "HeldOut":
        """Map the inputs.

        Args:
            matrix: (G, F).

        Returns:
            The same tokens with G inputs.
        """
        others, firsts = (
            Rows([(x.float() @ matrix.float().T, r) for x, r in rows.parts], rows.reached)
            for rows in (self.others, self.firsts)
        )
        return HeldOut(others, firsts)


@dataclass(frozen=True, slots=True)
class Choice:
    """A map that was chosen.

    Attributes:
        solution: (D, F) float64.
        ridge: its penalty, as a share of the inputs' mean square.
        first_weight: what first tokens counted.
    """

    solution: torch.Tensor
    ridge: float
    first_weight: float


def choose(
    fitted: NormalEquations,
    held_out: HeldOut,
    penalty: torch.Tensor,
    *,
    first_weights: Sequence[float],
    start: float = FIRST_RIDGE,
) -> Choice | None:
    """Choose the map with the least relative error on held-out tokens.

    The penalty is climbed to from ``start`` with the first of the weights; then the other weights
    are tried with it.

    Args:
        fitted: the equations of the tokens to fit.
        held_out: other tokens.
        penalty: (F,) float64, the factor of the penalty for each input.
        first_weights: weights of the first tokens that are tried.
        start: the penalty to begin with, one of ``RIDGES``.

    Returns:
        The map; None if none has a finite error.
    """
    errors: dict[tuple[float, float], float] = {}
    last: list[torch.Tensor] = []

    def error(ridge: float, weight: float) -> float:
        if (ridge, weight) not in errors:
            last[:] = [fitted.solve(ridge, penalty, weight)]
            errors[ridge, weight] = held_out.relative_error(last[0])
        return errors[ridge, weight]

    best, weight = _nearest(start), first_weights[0]
    while True:
        around = [i for i in (best, best + 1, best - 1) if 0 <= i < len(RIDGES)]
        least = min(around, key=lambda i: error(RIDGES[i], weight))
        if least == best:
            break
        best = least
    ridge = RIDGES[best]
    weight = min(first_weights, key=lambda w: error(ridge, w))
    if math.isinf(error(ridge, weight)):
        return None
    if next(reversed(errors)) != (ridge, weight):
        last[:] = [fitted.solve(ridge, penalty, weight)]
    return Choice(last[0], ridge, weight)


def _nearest(ridge: float) -> int:
    """The index of the penalty that is nearest to one."""
    return min(range(len(RIDGES)), key=lambda index: abs(math.log(RIDGES[index] / ridge)))
