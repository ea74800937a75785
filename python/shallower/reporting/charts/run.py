"""Figures of a run: the race of proposals, the scan, and the healing."""

import math

import numpy as np
from numpy.typing import NDArray

from ...results.healing import Healing
from ...results.verification import Verified
from ...scanning.scan import Scan
from ...values.layers import ranges
from .drawing import Drawing
from .heat_map import Shares, heat_maps
from .plots import Axis, Line, Point, dot_chart, line_chart

_MOST_ROWS = 14
"""Proposals that are drawn."""

_MOST_STEPS = 200
"""Points of a training that are drawn."""


def race_charts(verified: Verified) -> list[Drawing]:
    """Draw what other proposals lose more than the winner; nothing where it was alone."""
    ended = [one for one in verified.candidates[:_MOST_ROWS] if math.isfinite(one.score)]
    if len(ended) < 2:
        return []
    points = tuple(
        Point(
            place,
            one.difference.mean,
            one.difference.stderr,
            f"without {ranges(one.plan.dropped)}",
        )
        for place, one in enumerate(ended)
    )
    diverge = verified.measure == "divergence"
    return [
        dot_chart(
            "proposals",
            [_shortened(ranges(one.plan.dropped)) for one in ended],
            [Line("difference", points, "blue", marker="o")],
            title=f"What other proposals {'diverge' if diverge else 'lose'} more than the winner",
            text="Each row is a set of layers that could have gone, with the paired difference "
            f"of its score to the winner's and one standard error, in {verified.measured_in}. What "
            "reaches the dotted line within two errors cannot be told from the winner.",
            x=Axis(f"more than the winner, {verified.unit}{' of divergence' if diverge else ''}"),
            reference=(0.0, "the winner"),
        )
    ]


def scan_charts(scan: Scan, shares: Shares | None) -> list[Drawing]:
    """Draw the least distance by block size, and heat maps; ``shares``: how stable l* is."""
    if "angular" not in scan.metrics or scan.num_layers < 2:
        return []
    points = []
    for n in range(1, scan.num_layers):
        block = scan.best_block(n, "angular")
        assert block.score is not None
        stderr = math.nan if block.stderr is None else block.stderr
        points.append(Point(n, block.score, stderr, f"n = {n}, {block}"))
    least = line_chart(
        "least_distance",
        [Line("block of least distance", tuple(points), "blue", marker="o")],
        title="The least distance of a block, over its size",
        text="Angular distance between the ends of the most alike block of n layers, with a band "
        "of one standard error; where it climbs steeply, layers begin to do different things.",
        x=Axis("layers dropped n", digits=0),
        y=Axis("least angular distance", digits=4),
    )
    return [least, *heat_maps(scan, shares)]


def healing_chart(healing: Healing) -> Drawing:
    """Draw the losses of a healing over its steps, with the models before it as level lines."""
    held_out = tuple(
        Point(step, loss.nats, loss.stderr, f"step {step}")
        for step, loss in healing.held_out.items()
    )
    lines = [Line("training, smoothed", _training(healing), "orange", "dotted", ",")]
    lines += [Line("held out", held_out, "blue", marker="o")] if held_out else []
    models = (("whole model", healing.original), ("cut, not patched", healing.cut))
    return line_chart(
        "healing",
        [line for line in lines if line.points],
        title=f"The healing of {healing.model.name}, step by step",
        text="Training loss, smoothed, and held-out loss with a band of one standard error; "
        f"step {healing.best_step} was kept.",
        x=Axis("steps", digits=0),
        y=Axis("loss, nats a token"),
        references=[(loss.nats, name) for name, loss in models if loss is not None],
    )


def _training(healing: Healing) -> tuple[Point, ...]:
    """At most 200 points of the smoothed training loss."""
    size = len(healing.steps)
    weight = min(0.98, max(0.5, 1 - 10 / max(1, size)))
    losses = smoothed(np.array([step.loss for step in healing.steps]), weight)
    steps = list(zip(healing.steps, losses, strict=True))[:: max(1, size // _MOST_STEPS)]
    return tuple(
        Point(step.step, float(loss), math.nan, f"step {step.step}") for step, loss in steps
    )


def smoothed(values: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """Smooth (steps,) values by an unbiased exponential moving average, ``weight`` in [0, 1)."""
    sums = norms = 0.0
    means = []
    for value in values:
        sums, norms = weight * sums + value, weight * norms + 1.0
        means.append(sums / norms)
    return np.array(means)


def _shortened(text: str) -> str:
    return text if len(text) <= 22 else f"{text[:21]}…"
