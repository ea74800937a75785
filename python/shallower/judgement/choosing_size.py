"""How many layers are to go: the target, or the knee of the curve."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import PlanError
from ..results.scores import Difference
from ..settings.target import Target
from ..values.counts import counted
from ..values.estimates import format_size

STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Sizes of which a curve is made, up to half of the layers."""


@dataclass(frozen=True, slots=True)
class SizeChoice:
    """How many layers are to go, and why so many, as half a sentence."""

    n: int
    reason: str


def curve_sizes(num_layers: int) -> list[int]:
    """The sizes of which a curve is made: :data:`STEPS` up to half of the layers, 1 at least."""
    return [n for n in STEPS if n <= max(1, num_layers // 2)]


def choose_size(
    target: Target,
    num_layers: int,
    *,
    lost: Callable[[int], Difference],
    left: Callable[[int], float],
    left_at_least: Callable[[int], float],
) -> SizeChoice:
    """Find how many of ``num_layers`` layers to drop, and the reason.

    ``lost`` gives the loss of a size after a quick patch, on selection texts; it is called rarely,
    and taken to grow with the size. ``left`` and ``left_at_least`` give what the best cut and any
    cut of a size leave, in the unit of the target: parameters, share of a token's time, bytes.
    """
    require_possible(target, num_layers, left_at_least)
    n = target.size(num_layers)
    if n is not None:
        return SizeChoice(n, f"{target}, as requested")
    limit = _limit_of(target)
    if limit is not None:
        found = (n for n in range(1, num_layers) if left_at_least(n) <= limit.most)
        n = next((n for n in found if left(n) <= limit.most), None)
        if n is None:
            raise _never(limit, num_layers, left(num_layers - 1))
        return SizeChoice(n, f"the fewest layers whose absence {limit.leaves}")
    if target.max_loss is not None:
        return _within(target.max_loss, num_layers, lost)
    return knee({n: lost(n) for n in curve_sizes(num_layers)})


def require_possible(
    target: Target, num_layers: int, left_at_least: Callable[[int], float]
) -> None:
    """Refuse a target that no cut can reach, as far as that is known before any is tried."""
    target.size(num_layers)
    limit = _limit_of(target)
    if limit is None:
        return
    most, in_words = limit.most, limit.in_words
    if left_at_least(0) <= most:
        raise PlanError(
            f"the model {limit.has} {in_words(left_at_least(0))}, which is no more than "
            f"{in_words(most)} already: nothing has to go; ask for less ({limit.option})"
        )
    if left_at_least(num_layers - 1) > most:
        raise _never(limit, num_layers, left_at_least(num_layers - 1))


def _never(limit: "_Limit", num_layers: int, least: float) -> PlanError:
    return PlanError(
        f"no cut {limit.leaves}: with one layer of {num_layers} it {limit.has} "
        f"{limit.in_words(least)} still, those outside the layers among them; ask for more "
        f"({limit.option})"
    )


class _Limit(NamedTuple):
    """A measure that is to be at most so much."""

    most: float
    leaves: str  # what a cut does that keeps to it
    in_words: Callable[[float], str]
    has: str  # what a model does that has so much, a value to follow
    option: str  # the option that names it


def _limit_of(target: Target) -> _Limit | None:
    if target.params is not None:
        return _Limit(
            target.params,
            f"leaves at most {target.params:,} parameters",
            lambda value: f"{value:,} parameters",
            "has",
            "params, --params",
        )
    if target.latency is not None:
        return _Limit(
            target.latency,
            f"leaves at most {target.latency:g} of the time of a token",
            lambda value: f"{value:.3g} of the time of a token",
            "takes",
            "latency, --target-latency",
        )
    if target.memory is not None:
        beside = f" of weights and cache, at {counted(target.context, 'token')}"
        return _Limit(
            target.memory,
            f"leaves at most {format_size(target.memory)}{beside}",
            lambda value: f"{format_size(round(value))}{beside}",
            "takes",
            "memory, --target-memory",
        )
    return None


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
    """Find the knee of a curve, the size farthest below the line between its ends, and the reason.

    The line goes from no layer to the largest size (Kneedle, Satopää et al. 2011, unsmoothed). A
    curve nowhere below it gives the least size.
    """
    sizes = sorted(lost)
    end = sizes[-1]
    slope = lost[end].mean / end
    below = {n: slope * n - lost[n].mean for n in sizes} | {end: 0.0}
    n = max(sizes, key=lambda size: (below[size], -size))
    if not below[n] > 0:
        return SizeChoice(sizes[0], "the least size, as the curve has no knee")
    before = lost[n].mean / n
    behind = (lost[end].mean - lost[n].mean) / (end - n)
    return SizeChoice(
        n,
        f"the knee of the curve: up to {n}, a layer costs {before:.3f} nats a token; from there to "
        f"{end}, {behind:.3f}",
    )
