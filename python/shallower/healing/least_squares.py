"""Linear maps by least squares, from sums over tokens: memory grows with the widths alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

ROWS = 4096
"""Tokens over which products are summed in float32, at most; beyond, in float64."""

PANEL = 384
"""Columns of the symmetric products that are made at once."""


@contextmanager
def _exact_in_bfloat16(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 round their factors to bfloat16, if that is what they come from."""
    before = torch.get_float32_matmul_precision()
    try:
        if dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(slots=True)
class NormalEquations:
    """The sums that a least-squares map from F inputs to D outputs needs.

    Attributes:
        gram: (F, F) float64, the sum of x xᵀ.
        cross: (F, D) float64, the sum of x rᵀ.
        count: tokens.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    count: int = 0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> "NormalEquations":
        """Start with sums of zero.

        Args:
            inputs: F.
            outputs: D.
            device: the device of the sums.

        Returns:
            Sums over no tokens.
        """
        gram, cross = (
            torch.zeros(inputs, columns, dtype=torch.float64, device=device)
            for columns in (inputs, outputs)
        )
        return cls(gram, cross)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add tokens.

        Args:
            inputs: (N, F), of any float dtype.
            targets: (N, D), of any float dtype.
        """
        for x, r in zip(inputs.split(ROWS), targets.split(ROWS), strict=True):
            wide = x.float()
            with _exact_in_bfloat16(x.dtype):
                for start in range(0, wide.shape[1], PANEL):
                    self._add_panel(wide[:, start:].T @ wide[:, start : start + PANEL], start)
            self.cross += wide.T @ r.float()
        self.count += len(inputs)

    def _add_panel(self, products: torch.Tensor, start: int) -> None:
        """Add columns of the products, from the diagonal on, and the rows that mirror them."""
        stop = start + products.shape[1]
        self.gram[start:, start:stop] += products
        self.gram[start:stop, stop:] += products[stop - start :].T

    def plus(self, other: "NormalEquations", weight: float) -> "NormalEquations":
        """Add the tokens of other sums, each counted ``weight`` times.

        Args:
            other: sums of the same F and D.
            weight: the weight of its tokens.

        Returns:
            New sums.
        """
        return NormalEquations(
            self.gram + weight * other.gram,
            self.cross + weight * other.cross,
            self.count + other.count,
        )

    def mapped(self, matrix: torch.Tensor) -> "NormalEquations":
        """Map the inputs: the sums of y = ``matrix`` x.

        Args:
            matrix: (G, F).

        Returns:
            New sums of G inputs.
        """
        matrix = matrix.to(self.gram)
        return NormalEquations(matrix @ self.gram @ matrix.T, matrix @ self.cross, self.count)

    def solve(self, ridge: float, penalty: torch.Tensor) -> torch.Tensor:
        """Find the map with the least sum of squared errors and penalties.

        Args:
            ridge: cost of the squares of the map's entries.
            penalty: (F,) float64, the factor of ``ridge`` for each input.

        Returns:
            (D, F) float64.
        """
        regular = self.gram + torch.diag(ridge * penalty)
        factor = torch.linalg.cholesky(regular)
        return torch.cholesky_solve(self.cross, factor).T

    @property
    def scale(self) -> torch.Tensor:
        """The mean square of an input, as a sum over tokens."""
        return self.gram.diagonal().mean()
