"""Plots: lines with bands of error, rows of points, and points with their Pareto front."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .drawing import (
    COLOURS,
    SERIES,
    SETTINGS,
    Drawing,
    lay_out,
    marks_at,
    new_figure,
    require_matplotlib,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PURPOSE = "drawing the figures of a report"

_STYLES: dict[str, Any] = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1.2, 1.6))}
_MARKERS = "osD^vP*X"

_LONG_NAME = 27
"""Letters from which on a legend has one column."""


@dataclass(frozen=True, slots=True)
class Point:
    """A measured value."""

    x: float
    y: float
    stderr: float  # NaN where there is none
    name: str  # what was measured, in a few words


@dataclass(frozen=True, slots=True)
class Line:
    """Points that belong together."""

    name: str  # its name in the legend
    points: tuple[Point, ...]  # in the order of x
    colour: str  # of figures
    style: Literal["solid", "dashed", "dotted"] = "solid"
    marker: str = ""  # of matplotlib; by default by its place


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis, with its unit in the label."""

    label: str
    is_share: bool = False  # shown as per cent
    digits: int = 3  # of a value

    def show(self, value: float) -> str:
        """Write a value."""
        return f"{100 * value:.1f} %" if self.is_share else f"{value:.{self.digits}f}"

    def show_with_error(self, value: float, stderr: float) -> str:
        """Write a value with its standard error, if it has one."""
        if not math.isfinite(stderr):
            return self.show(value)
        if self.is_share:
            return f"{100 * value:.1f} ± {100 * stderr:.1f} %"
        return f"{value:.{self.digits}f} ± {stderr:.{self.digits}f}"


Reference = tuple[float, str]
"""A level line and its name: the whole model, chance."""


BASELINES = ("deepest", "random")
"""Strategies that cost far more than those that are compared with them."""


def series_colour(place: int) -> str:
    """Give the colour of the line in a place, always the same."""
    return SERIES[place % len(SERIES)]


def is_one_figure(shares: Iterable[tuple[float, float]]) -> bool:
    """Whether two shares of what goes differ by a factor alone, within a hundredth."""
    ratios = [other / one for one, other in shares if one]
    return not ratios or max(ratios) - min(ratios) <= 0.01 * max(ratios)


def in_sight(lines: Sequence[Line], whole: float, most: float) -> float:
    """Where a loss leaves the axis: at ``most``, or before baselines press all others flat."""
    others = [
        p.y for line in lines if line.name.partition(",")[0] not in BASELINES for p in line.points
    ]
    rise = max(others, default=math.inf) - whole
    return min(most, whole + 2 * rise) if rise > 0 else most


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    title: str,
    text: str,
    x: Axis,
    y: Axis,
    references: Sequence[Reference] = (),
    most: float = math.inf,
) -> Drawing:
    """Draw lines with bands of one standard error, and level lines of reference.

    Lines leave the axis at ``most``; a value above stands at its edge, as a triangle that the
    legend names. Every line has a point.
    """
    require_matplotlib(_PURPOSE)
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        above = [(line, p) for line in lines for p in line.points if p.y > most]
        named = len(lines) + bool(above)
        columns = _columns(lines, 2 if len(lines) <= 8 else 3)
        rows = math.ceil(named / columns)
        figure, axes = new_figure(3.05 + 0.2 * rows * (named > 1))
        _set_axes(axes, x, y)
        for place, line in enumerate(lines):
            _draw_line(axes, line, line.marker or _MARKERS[place % len(_MARKERS)])
        _draw_references(axes, references, [p for line in lines for p in line.points])
        values = [*(p.y for line in lines for p in line.points), *(v for v, _ in references)]
        _limit(axes, values, most)
        _draw_above(axes, above, most, y)
        if named > 1:
            size = 8.5 if columns == 3 else 9
            figure.legend(
                loc="outside lower center",
                ncols=columns,
                handlelength=2.6,
                columnspacing=1.4,
                fontsize=size,
            )
        lay_out(figure)
        marks = marks_at(
            axes, [(p.x, p.y, _words(line, p, y)) for line in lines for p in line.points]
        )
    numbers = tuple(
        (line.name, p.name, x.show(p.x), y.show_with_error(p.y, p.stderr))
        for line in lines
        for p in line.points
    )
    head = ("line", "point", x.label, y.label)
    if above:
        text += " A triangle at the upper edge is a value above it, which is written beside it."
    return Drawing(name, title, text, figure, marks, head=head, numbers=numbers)


def dot_chart(
    name: str,
    labels: Sequence[str],
    series: Sequence[Line],
    *,
    title: str,
    text: str,
    x: Axis,
    reference: Reference | None = None,
) -> Drawing:
    """Draw rows of points with bars of one standard error, and an upright reference.

    ``x`` is the number of a row, with the first label above, and ``y`` the value.
    """
    require_matplotlib(_PURPOSE)
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        columns = _columns(series, min(4, len(series)))
        legend = math.ceil(len(series) / max(1, columns)) * (len(series) > 1)
        figure, axes = new_figure(0.85 + 0.21 * len(labels) + 0.2 * legend)
        axes.xaxis.set_major_formatter(lambda value, _: _tick(value, x))
        axes.set_xlabel(x.label)
        axes.set_yticks(range(len(labels)), labels, color=COLOURS["ink"])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        if reference is not None:
            axes.axvline(reference[0], color=COLOURS["muted"], linestyle=":", linewidth=1.2)
        shift = 0.5 / max(1, len(series))
        placed = []
        for place, line in enumerate(series):
            up = (place - (len(series) - 1) / 2) * shift
            rows = np.array([p.x + up for p in line.points])
            values = np.array([p.y for p in line.points])
            error = np.nan_to_num([p.stderr for p in line.points])
            marker = line.marker or _MARKERS[place % len(_MARKERS)]
            axes.errorbar(
                values,
                rows,
                xerr=error,
                fmt=marker,
                color=COLOURS[line.colour],
                label=line.name,
                markersize=4.6,
                elinewidth=1.1,
            )
            placed += [
                (p.y, p.x + up, f"{p.name}: {x.show_with_error(p.y, p.stderr)}")
                for p in line.points
            ]
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=columns, handlelength=1)
        lay_out(figure)
        marks = marks_at(axes, placed)
    numbers = tuple(
        (labels[int(p.x)], line.name, x.show_with_error(p.y, p.stderr))
        for line in series
        for p in line.points
    )
    head = ("", "series", x.label)
    return Drawing(name, title, text, figure, marks, head=head, numbers=numbers)


def front_chart(
    name: str,
    points: Mapping[str, tuple[float, float]],
    styles: Mapping[str, tuple[str, str]],
    *,
    title: str,
    text: str,
    x: Axis,
    y: Axis,
) -> Drawing:
    """Draw points by name over two figures of which less is better, with their Pareto front.

    Both axes are logarithmic but for zero. ``styles`` has colour and marker of every name.
    """
    require_matplotlib(_PURPOSE)
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        figure, axes = new_figure(3.4 + 0.2 * math.ceil(len(points) / 3))
        axes.set_xlabel(x.label)
        axes.set_ylabel(y.label)
        _set_log_axes(axes, list(points.values()))
        front = pareto_front(points)
        steps = np.array(
            [*(points[one] for one in front), (axes.get_xlim()[1], points[front[-1]][1])]
        )
        axes.step(*steps.T, where="post", color=COLOURS["muted"], linewidth=1.3, zorder=1)
        for one, point in points.items():
            colour, marker = styles[one]
            axes.plot(
                *point,
                marker,
                color=COLOURS[colour],
                label=one,
                markersize=6,
                clip_on=False,
                markeredgecolor=COLOURS["paper"],
                markeredgewidth=0.5,
            )
        _name_front(axes, points, front)
        figure.legend(loc="outside lower center", ncols=3, handlelength=1, fontsize=8.5)
        lay_out(figure)
        words = {one: f"{one}: {y.show(b)} at {x.show(a)}" for one, (a, b) in points.items()}
        marks = marks_at(axes, [(*points[one], words[one]) for one in points])
    numbers = tuple(
        (one, x.show(points[one][0]), y.show(points[one][1]), "yes" if one in front else "")
        for one in sorted(points, key=lambda one: points[one][::-1])
    )
    head = ("", x.label, y.label, "on the front")
    return Drawing(name, title, text, figure, marks, head=head, numbers=numbers)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Find points that no other beats in one figure without losing in the other, by the first."""
    front = [
        name
        for name, (cost, regret) in points.items()
        if not any(
            other_cost <= cost and other <= regret and (other_cost, other) != (cost, regret)
            for other_cost, other in points.values()
        )
    ]
    return sorted(front, key=lambda name: points[name])


def _set_log_axes(axes: "Axes", points: Sequence[tuple[float, float]]) -> None:
    """Scale both axes by the logarithm but for zero, with ticks at powers of ten."""
    from matplotlib.ticker import FixedLocator, NullLocator

    costs, regrets = zip(*points, strict=True)
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
        axis.set_major_formatter(lambda value, _: _power(value))


def _power(value: float) -> str:
    """Write ``0.01``, ``1``, ``10k``, ``1M``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _name_front(
    axes: "Axes", points: Mapping[str, tuple[float, float]], front: Sequence[str]
) -> None:
    """Name the points of the front below to the left, where none can lie; the first otherwise."""
    names: dict[tuple[float, float], list[str]] = {}
    for name in front:
        names.setdefault(points[name], []).append(name)
    for place, (point, alike) in enumerate(names.items()):
        axes.annotate(
            ", ".join(alike),
            point,
            xytext=(-4 if place else 4, -3),
            textcoords="offset points",
            ha="right" if place else "left",
            va="top",
            fontsize=8.5,
        )


def _columns(lines: Sequence[Line], most: int) -> int:
    """The columns of a legend, as many as the longest name leaves room for."""
    longest = max((len(line.name) for line in lines), default=0)
    return 1 if longest > _LONG_NAME else min(most, max(1, 2 * _LONG_NAME // max(1, longest)))


def _words(line: Line, point: Point, y: Axis) -> str:
    return f"{line.name}, {point.name}: {y.show_with_error(point.y, point.stderr)}"


def _tick(value: float, axis: Axis) -> str:
    return f"{round(100 * value, 1):g} %" if axis.is_share else f"{value:g}"


def _set_axes(axes: "Axes", x: Axis, y: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=not x.is_share and x.digits == 0))
    for axis, what in ((axes.xaxis, x), (axes.yaxis, y)):
        if what.is_share:
            axis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g} %")


def _draw_line(axes: "Axes", line: Line, marker: str) -> None:
    colour = COLOURS[line.colour]
    x = np.array([p.x for p in line.points])
    y = np.array([p.y if math.isfinite(p.y) else math.nan for p in line.points])
    error = np.nan_to_num([p.stderr for p in line.points])
    axes.plot(x, y, marker, linestyle=_STYLES[line.style], color=colour, label=line.name)
    axes.fill_between(x, y - error, y + error, color=colour, alpha=0.18, linewidth=0)


def _draw_references(
    axes: "Axes", references: Sequence[Reference], points: Sequence[Point]
) -> None:
    """Draw level lines, named at the end farther from all points, above or below the line."""
    first, last = min(p.x for p in points), max(p.x for p in points)
    least = min(p.y for p in points)
    for value, name in references:
        below = value <= least
        of_first, of_last = (
            min(abs(p.y - value) for p in points if p.x == end) for end in (first, last)
        )
        place, align = (0.005, "left") if of_first > of_last else (0.995, "right")
        axes.axhline(value, color=COLOURS["muted"], linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate(
            name,
            (place, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3 if below else 2),
            textcoords="offset points",
            ha=align,
            va="top" if below else "bottom",
            fontsize=8.5,
            color=COLOURS["muted"],
        )


_PLACES = 8
"""Places beside one another in which the values of triangles can stand."""


def _draw_above(axes: "Axes", above: Sequence[tuple[Line, Point]], most: float, y: Axis) -> None:
    """Draw triangles at the upper edge for values above it, with near values below one another."""
    if not above:
        return
    left, right = axes.get_xlim()
    by_place: dict[int, list[tuple[Line, Point]]] = {}
    for line, point in sorted(above, key=lambda one: -one[1].y):
        by_place.setdefault(round(_PLACES * point.x / (right - left)), []).append((line, point))
    for points in by_place.values():
        for number, (line, point) in enumerate(points):
            x, colour = point.x, COLOURS[line.colour]
            side = "right" if x > (left + right) / 2 else "left"
            axes.plot(x, most, "^", color=colour, fillstyle="none", clip_on=False)
            axes.annotate(
                y.show(point.y),
                (x, most),
                xytext=(-6 if side == "right" else 6, -9 * number),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8.5,
                color=colour,
                bbox={"facecolor": COLOURS["paper"], "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )
    name = "value above axis"
    axes.plot([], [], "^", color=COLOURS["muted"], fillstyle="none", label=name)


def _limit(axes: "Axes", values: Sequence[float], most: float) -> None:
    """Set the height by the values in sight, with a margin, also where all are equal."""
    seen = [min(value, most) for value in values if math.isfinite(value)]
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    margin = max(0.07 * (high - low), 0.01 * abs(high), 1e-6)
    clipped = any(value > most for value in values)
    axes.set_ylim(low - 1.5 * margin, most if clipped else high + 1.6 * margin)
