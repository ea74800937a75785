"""Linear maps by least squares, from sums over tokens: memory grows with the widths alone.

The sums are one Gram matrix and one cross product, and a solution takes one copy of both. The copy
of the Gram matrix is factored in place; that of the cross product becomes the map.

How much a map may change, and how much first tokens count, is chosen on held-out tokens. The
equations and the errors on some thousand kept rows suffice: no layer runs, and no loss is measured.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch

ROWS = 4096
"""Tokens over which products are summed in float32, at most; beyond, in float64."""

PANEL = 384
"""Columns of the symmetric products that are made at once."""

CROSS_PANEL = 4096
"""Inputs whose products with the targets are made at once."""

KEPT_ROWS = 512
"""Kept tokens whose products are made at once, in float64."""


@contextmanager
def _exact_in_bfloat16(dtype: torch.dtype) -> Iterator[None]:
    """Let products of float32 round their factors to bfloat16, if that is what they come from.

    A CPU then multiplies in bfloat16, CUDA in TF32, which has bfloat16's exponents and three bits
    more. Either way such factors are not rounded, and the sums are float32. A process that has
    set this backend by backend, for which torch has no common name, keeps its own choice.
    """
    before = None
    if dtype == torch.bfloat16:
        with suppress(RuntimeError):
            before = torch.get_float32_matmul_precision()
    if before is None:
        yield
        return
    try:
        torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(slots=True)
class NormalEquations:
    """The sums that a least-squares map from F inputs to D outputs needs."""

    gram: torch.Tensor  # (F, F) float64, the sum of x xᵀ
    cross: torch.Tensor  # (F, D) float64, the sum of x rᵀ
    count: int = 0  # tokens in these sums
    # Tokens (N, F) and targets (N, D) in no sum, weighted when solved.
    kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> "NormalEquations":
        """Start with the sums over no tokens."""
        gram, cross = (
            torch.zeros(inputs, columns, dtype=torch.float64, device=device)
            for columns in (inputs, outputs)
        )
        return cls(gram, cross)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add tokens: inputs (N, F) and targets (N, D), of any float dtype."""
        for x, r in zip(inputs.split(ROWS), targets.split(ROWS), strict=True):
            wide, right = x.float(), r.float()
            with _exact_in_bfloat16(x.dtype):
                for start in range(0, wide.shape[1], PANEL):
                    self._add_panel(wide[:, start:].T @ wide[:, start : start + PANEL], start)
            for some, sums in zip(
                wide.split(CROSS_PANEL, dim=1), self.cross.split(CROSS_PANEL), strict=True
            ):
                sums += some.T @ right
        self.count += len(inputs)

    def _add_panel(self, products: torch.Tensor, start: int) -> None:
        """Add columns of the products, from the diagonal on, and the rows that mirror them."""
        stop = start + products.shape[1]
        self.gram[start:, start:stop] += products
        self.gram[start:stop, stop:] += products[stop - start :].T

    def keep(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep a few tokens apart from the sums: (N, F) and (N, D), of any float dtype."""
        self.kept.append((inputs, targets))

    def join(self, other: "NormalEquations") -> None:
        """Add the tokens of other equations of the same widths, on the same device."""
        self.gram += other.gram
        self.cross += other.cross
        self.count += other.count
        self.kept += other.kept

    def error_of(self, solution: torch.Tensor) -> float:
        """Sum the squared errors of a (D, F) float64 map, less those of no map at all.

        Over the tokens of these sums, without the kept ones; NaN for a map that holds NaN.
        """
        quadratic = (solution @ self.gram).mul_(solution).sum()
        return float(quadratic - 2 * (solution * self.cross.mT).sum())

    def solve(self, ridge: float, penalty: torch.Tensor, kept_weight: float = 0.0) -> torch.Tensor:
        """Find the (D, F) float64 map with the least sum of squared errors and penalties.

        Each square of an entry costs ``ridge`` times the (F,) float64 ``penalty`` of its input, and
        each kept token counts ``kept_weight`` times. NaN where the equations have no solution.
        """
        gram, solution = self.gram.clone(), self._turned_cross()
        self._add_kept(gram, solution, kept_weight)
        gram.diagonal().add_(ridge * penalty)
        # Columns one after the other, as LAPACK and cuSOLVER want them: neither call copies.
        lower, right = gram.mT, solution.mT
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        torch.linalg.solve_triangular(lower, right, upper=False, out=right)
        torch.linalg.solve_triangular(lower.mT, right, upper=True, out=right)
        return solution.masked_fill_(info != 0, torch.nan)

    def _turned_cross(self) -> torch.Tensor:
        """Copy the cross product as (D, F)."""
        return self.cross.mT.clone(memory_format=torch.contiguous_format)

    def _add_kept(self, gram: torch.Tensor, cross: torch.Tensor, weight: float) -> None:
        """Add the kept tokens to copies of the sums: to one triangle, and to (D, F)."""
        if not self.kept or not weight:
            return
        if len(self.kept) > 1:
            inputs, targets = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
            self.kept = [(inputs, targets)]
        inputs, targets = self.kept[0]
        for x, r in zip(inputs.split(KEPT_ROWS), targets.split(KEPT_ROWS), strict=True):
            x, r = x.to(gram), r.to(gram)
            cross.addmm_(r.T, x, alpha=weight)
            for start in range(0, x.shape[1], PANEL):
                panel = gram[start : start + PANEL, start:]
                panel.addmm_(x[:, start : start + PANEL].T, x[:, start:], alpha=weight)

    @property
    def scale(self) -> torch.Tensor:
        """The mean square of an input, as a sum over tokens."""
        return self.gram.diagonal().mean()


RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties on the change of a matrix, as shares of its inputs' mean square, ascending."""

FIRST_RIDGE = 0.1
"""The penalty that is tried first; its neighbours follow, as long as one of them is better."""


@dataclass(slots=True)
class Rows:
    """Tokens by which maps are compared."""

    # Inputs (N, F) and targets (N, D) by batch.
    parts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    reached: float = 0.0  # sum of squares of the states that the targets lead to

    def error(self, solution: torch.Tensor | None = None) -> float:
        """Sum the squared errors of a (D, F) map; of no map at all by default."""
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
    """Held-out tokens."""

    others: Rows = field(default_factory=Rows)  # all but the first of every text
    firsts: Rows = field(default_factory=Rows)  # first tokens, with massive activations

    def relative_error(self, solution: torch.Tensor) -> float:
        """Sum both kinds' squared errors of a (D, F) map, as shares of the states' squares.

        Norms stand before all that read the stream, so that an error counts by its share. Every
        token reads the first one: all of them together count as much as all others. Infinity where
        it is not finite.
        """
        kinds = self.others, self.firsts
        total = sum(rows.error(solution) / rows.reached for rows in kinds if rows.reached)
        return total if math.isfinite(total) else math.inf


def choose(
    fitted: NormalEquations,
    held_out: HeldOut,
    penalty: torch.Tensor,
    *,
    first_weights: Sequence[float],
    start: float = FIRST_RIDGE,
) -> tuple[torch.Tensor, float, float] | None:
    """Choose the map with the least relative error on held-out tokens; None if none is finite.

    Returns the (D, F) float64 map, its ridge and the weight of first tokens. From ``start``, one of
    ``RIDGES``, the penalty descends to a least error with the first of the weights; then the other
    weights of first tokens are tried with it.
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
    return last[0], ridge, weight


def _nearest(ridge: float) -> int:
    """The index of the penalty that is nearest to one."""
    return min(range(len(RIDGES)), key=lambda index: abs(math.log(RIDGES[index] / ridge)))


def solver_bytes(
    inputs: int,
    outputs: int,
    *,
    batch_tokens: int,
    kept_tokens: int,
    value_bytes: int,
    held_tokens: int = 0,
    forward: int = 0,
    losses: int = 0,
) -> int:
    """Count what normal equations take at the peak beside the model and its forward.

    ``inputs`` is F, of both writers of a layer together, and ``outputs`` D. ``batch_tokens``
    include padding; ``kept_tokens`` are first tokens, one a text that is fitted; on ``held_tokens``
    solutions are chosen. Tokens are added during a ``forward`` of so many bytes; one for ``losses``
    runs apart.
    """
    sums = 8 * inputs * (inputs + outputs)
    row = inputs * value_bytes + outputs * 4
    kept, held_out = kept_tokens * row, held_tokens * row
    rows, some = min(batch_tokens, ROWS), min(kept_tokens, KEPT_ROWS)
    # The inputs joined and without padding; what is missing, twice likewise; all in float32.
    batch = batch_tokens * (2 * inputs * value_bytes + 2 * outputs * 4)
    products = max(inputs * PANEL, min(inputs, CROSS_PANEL) * outputs)
    held = sums + kept + held_out + inputs * outputs * value_bytes  # and the old matrix
    adding = batch + 4 * (rows * inputs + products)
    solving = sums + max(kept, 8 * some * (inputs + outputs))
    return held + max(adding + forward, solving, losses) - forward
