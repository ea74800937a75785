"""The figure of regret over cost, and its Pareto front."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .criteria_styles import DPI, FRONT, GREY, NAME_SIZE, POINT, Group, Styles, add_legend, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = 4.6
"""Inches of a panel's height."""

Points = Mapping[str, tuple[float, float]]
"""Cost and regret by criterion."""

_OFFSETS = (
    (1, 0), (0.8, 0.8), (0.8, -0.8), (-1, 0), (-0.8, 0.8), (-0.8, -0.8), (0, 1), (0, -1),
    (2, 1.5), (2, -1.5), (-2, 1.5), (-2, -1.5), (3, 0), (3, 3), (3, -3),
)  # fmt: skip
"""Where a name is tried beside its point, in radii of a point."""


def regrets_figure(groups: Sequence[Group], styles: Styles, unit: str) -> "Figure":
    """Draw the mean regret of each criterion over its cost, and the Pareto front.

    Args:
        groups: a panel each.
        styles: colour and marker by criterion.
        unit: of the regret.

    Returns:
        The figure; a criterion that has not chosen for all sizes is not in it.
    """
    figure, axes = grid(len(groups), 1, 1, height=_PANEL, right=0.25)
    for panel, group in zip(axes[:, 0], groups, strict=True):
        sizes = ", ".join(str(n) for n in sorted({row.n for row in group.rows}))
        panel.set_title(f"{group.title}: mean over n = {sizes}", loc="left", fontweight="bold")
        panel.set_ylabel(f"regret, {unit}")
        panel.set_xlabel("cost of a choice, layer-forwards")
        if points := group.means():
            _regret_panel(panel, points, styles)
            _name_points(figure, panel, points)
    add_legend(figure, styles, front="none is both\ncheaper and better")
    return figure


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Find the points that no other beats in one figure without losing in the other.

    Args:
        points: by name two figures, of both of which less is better.

    Returns:
        The names, by the first figure; of points that are the same, all.
    """
    front = [
        name
        for name, (cost, regret) in points.items()
        if not any(
            other_cost <= cost and other <= regret and (other_cost, other) != (cost, regret)
            for other_cost, other in points.values()
        )
    ]
    return sorted(front, key=lambda name: points[name])


def _regret_panel(axes: "Axes", points: Points, styles: Styles) -> None:
    """Points by cost and regret, both by their logarithm but for zero, and the front."""
    from matplotlib.ticker import FixedLocator, NullLocator

    costs = [cost for cost, _ in points.values()]
    regrets = [regret for _, regret in points.values()]
    least_cost = min((cost for cost in costs if cost > 0), default=1.0)
    least = max(min((regret for regret in regrets if regret > 0), default=0.01), 0.003)
    axes.set_xscale("symlog", linthresh=least_cost / 2, linscale=0.35)
    axes.set_yscale("symlog", linthresh=least, linscale=0.35)
    axes.set_xlim(-0.15 * least_cost, max(*costs, 10 * least_cost) * 2.5)
    axes.set_ylim(-0.35 * least, max(*regrets, 10 * least) * 1.6)
    for axis, smallest in ((axes.xaxis, least_cost / 2), (axes.yaxis, least)):
        decades = range(math.ceil(math.log10(smallest)), 19)
        axis.set_major_locator(FixedLocator([0.0, *(10.0**k for k in decades)]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: _short(value))
    axes.step(*_front_line(axes, points).T, where="post", color=FRONT, linewidth=1.6, zorder=1)
    for name, (cost, regret) in points.items():
        colour, marker = styles[name]
        axes.plot(
            cost, regret, marker=marker, color=colour, markersize=9, linestyle="none",
            clip_on=False, **POINT,
        )  # fmt: skip


def _short(value: float) -> str:
    """``0.01``, ``1``, ``10k``, ``1M``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _front_line(axes: "Axes", points: Points) -> NDArray[np.float64]:
    """The front as (N, 2), on to the right edge."""
    front = [points[name] for name in pareto_front(points)]
    return np.array([*front, (axes.get_xlim()[1], front[-1][1])])


def _name_points(figure: "Figure", axes: "Axes", points: Points) -> None:
    """Name the points where nothing else is, those on the front first and in bold.

    Points at one place have one name together. A name that finds no place is left to the legend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(figure).get_renderer()
    scale = DPI / 72
    taken = [
        Bbox.from_bounds(x - 6 * scale, y - 6 * scale, 12 * scale, 12 * scale)
        for x, y in map(axes.transData.transform, points.values())
    ]
    steps = axes.transData.transform(_front_line(axes, points))
    for (left, y), (right, below) in pairwise(steps):
        taken += [Bbox([(left, y - 1), (right, y + 1)]), Bbox([(right - 1, below), (right + 1, y)])]
    names: dict[tuple[float, float], list[str]] = {}
    front = pareto_front(points)
    for name in [*front, *sorted(set(points) - set(front), key=lambda name: points[name])]:
        names.setdefault(points[name], []).append(name)
    for point, alike in names.items():
        bold = alike[0] in front
        text = axes.annotate(
            ", ".join(alike), point, xytext=(0, 0), textcoords="offset points", ha="left",
            va="bottom", fontsize=NAME_SIZE + bold, fontweight="bold" if bold else "normal",
            color="black" if bold else GREY,
        )  # fmt: skip
        x, y = axes.transData.transform(point)
        width, height = text.get_window_extent(renderer).size
        for right, up in _OFFSETS:
            # By the nearer edge: a name to the left ends beside its point.
            dx = right * 9 * scale - width * (0.5 if right == 0 else right < 0)
            dy = up * 9 * scale - height * (0.5 if up == 0 else up < 0)
            place = Bbox.from_bounds(x + dx, y + dy, width, height)
            within = Bbox.intersection(place, axes.bbox)
            fits = within is not None and np.allclose(within.size, place.size)
            if fits and not any(place.overlaps(other) for other in taken):
                text.set_position((dx / scale, dy / scale))
                taken.append(place)
                break
        else:
            text.remove()
