"""How many layers are to go: what was asked for, or the knee of the curve."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import PlanError
from ..values.scores import Difference
from ..values.wish import Wish

STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Sizes of which a curve is made, up to half of the layers."""


@dataclass(frozen=True, slots=True)
class SizeChoice:
    """How many layers are to go, and why so many, as half a sentence."""

    n: int
    reason: str


def curve_sizes(num_layers: int) -> list[int]:
    """Name the sizes of which a curve is made.

    Args:
        num_layers: layers of the model, at least 2.

    Returns:
        Some of :data:`STEPS`, ascending, up to half of the layers; 1 at least.
    """
    return [n for n in STEPS if n <= max(1, num_layers // 2)]


def sizes_beside(n: int, num_layers: int) -> list[int]:
    """Name the sizes that show what less or more than ``n`` would cost.

    Args:
        n: layers that are to go.
        num_layers: layers of the model.

    Returns:
        About half and one and a half times ``n``, where there are such cuts.
    """
    return sorted({size for size in (n // 2, n + (n + 1) // 2) if 0 < size < num_layers} - {n})


def choose_size(
    wish: Wish,
    num_layers: int,
    *,
    lost: Callable[[int], Difference],
    left: Callable[[int], int],
    left_at_least: Callable[[int], int],
) -> SizeChoice:
    """Find how many layers are to go.

    Args:
        wish: what is asked for.
        num_layers: layers of the model, L.
        lost: what the model loses without so many layers, after a quick patch, on texts that
            choose; asked for no more sizes than it takes, and taken to grow with them.
        left: parameters that the best cut of so many layers leaves.
        left_at_least: parameters that any cut of so many layers leaves, at least.

    Returns:
        The number, and why.

    Raises:
        LayersError: the model cannot lose so many.
        PlanError: no cut leaves so few parameters, or the whole model has no more.
    """
    n = wish.size(num_layers)
    if n is not None:
        return SizeChoice(n, f"{wish}, as asked for")
    if wish.params is not None:
        return _few_parameters(wish.params, num_layers, left, left_at_least)
    if wish.max_loss is not None:
        return _within(wish.max_loss, num_layers, lost)
    return knee({n: lost(n) for n in curve_sizes(num_layers)})


def _few_parameters(
    params: int, num_layers: int, left: Callable[[int], int], left_at_least: Callable[[int], int]
) -> SizeChoice:
    """The fewest layers whose absence leaves so few parameters."""
    if left_at_least(0) <= params:
        raise PlanError(
            f"the model has {left_at_least(0):,} parameters, which is no more than {params:,} "
            f"already: nothing has to go; ask for fewer (params, --params)"
        )
    reason = f"the fewest layers whose absence leaves at most {params:,} parameters"
    for n in range(1, num_layers):
        if left_at_least(n) <= params and left(n) <= params:
            return SizeChoice(n, reason)
    raise PlanError(
        f"no cut leaves {params:,} parameters or fewer: with one layer of {num_layers} there are "
        f"{left_at_least(num_layers - 1):,} still, those outside the layers among them; ask for "
        f"more (params, --params)"
    )


def _within(most: float, num_layers: int, lost: Callable[[int], Difference]) -> SizeChoice:
    """The most layers that can go for so many nats; one, if none can."""

    def fits(n: int) -> bool:
        return lost(n).mean <= most

    reason = f"the most layers that can go for {most:g} nats a token"
    sizes = [n for n in STEPS if n < num_layers]
    low, high = 0, num_layers
    for n in sizes:
        if not fits(n):
            high = n
            break
        low = n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return SizeChoice(max(1, low), reason)


def knee(lost: Mapping[int, Difference]) -> SizeChoice:
    """Find the knee of a curve: the size that lies farthest below the line between its ends.

    The line goes from no layer and no loss to the largest size (Satopää et al. 2011, Kneedle,
    without smoothing; as both axes are only scaled, the distance is measured along the losses).

    Args:
        lost: what the model loses, by the number of layers that go; one at least.

    Returns:
        The knee, with what a layer costs before it and behind it; of a curve that nowhere lies
        below the line, its least size.
    """
    sizes = sorted(lost)
    end = sizes[-1]
    slope = lost[end].mean / end
    below = {n: slope * n - lost[n].mean for n in sizes}
    n = max(sizes, key=lambda size: (below[size], -size))
    if not below[n] > 0:
        return SizeChoice(sizes[0], "the least size, as the curve of losses has no knee")
    before = lost[n].mean / n
    behind = (lost[end].mean - lost[n].mean) / (end - n)
    return SizeChoice(
        n,
        f"the knee of the curve: up to {n}, a layer costs {before:.3f} nats a token; from there to "
        f"{end}, {behind:.3f}",
    )
