"""Charts of a page: lines with errors, and rows of points; one panel each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .drawing import COLOURS, SERIES, SETTINGS, Drawing, lay_out, marks_at, new_figure
from .figures import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES: dict[str, Any] = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1.2, 1.6))}
_MARKERS = "osD^vP*X"


@dataclass(frozen=True, slots=True)
class Point:
    """A measured value.

    Attributes:
        x: where it stands.
        y: the value.
        stderr: its standard error; NaN where there is none.
        name: what it is of, in a few words.
    """

    x: float
    y: float
    stderr: float
    name: str


@dataclass(frozen=True, slots=True)
class Line:
    """Points that belong together.

    Attributes:
        name: in the legend.
        points: by x.
        colour: one of the colours of figures.
        style: ``solid``, ``dashed`` or ``dotted``.
        marker: as matplotlib has them; by colour, if none is named.
    """

    name: str
    points: tuple[Point, ...]
    colour: str
    style: Literal["solid", "dashed", "dotted"] = "solid"
    marker: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis.

    Attributes:
        label: with the unit.
        is_share: whether values are shares, shown as per cent.
        digits: of a value.
    """

    label: str
    is_share: bool = False
    digits: int = 3

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
    """Draw lines with bands of one standard error.

    Args:
        name: of the files.
        lines: with a point each at least.
        title: a headline.
        text: what is to be seen.
        x: the horizontal axis.
        y: the vertical axis.
        references: level lines.
        most: the highest value in sight; higher ones stand at the upper edge, as triangles.

    Returns:
        The figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib("drawing the figures of a report")
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        rows = math.ceil(len(lines) / 2)
        figure, axes = new_figure(3.05 + 0.2 * rows * (len(lines) > 1))
        _set_axes(axes, x, y)
        for place, line in enumerate(lines):
            _draw_line(axes, line, line.marker or _MARKERS[place % len(_MARKERS)], most)
        _draw_references(axes, references, [p for line in lines for p in line.points])
        _limit(axes, [*(p.y for line in lines for p in line.points), *(v for v, _ in references)],
               most)  # fmt: skip
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=2, handlelength=2.6, columnspacing=1.4)
        lay_out(figure)
        marks = marks_at(
            axes, [(p.x, p.y, _said(line, p, y)) for line in lines for p in line.points]
        )
    numbers = tuple(
        (line.name, p.name, x.show(p.x), y.show_with_error(p.y, p.stderr))
        for line in lines
        for p in line.points
    )
    head = ("line", "point", x.label, y.label)
    return Drawing(name, title, text, figure, marks, None, head, numbers)


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
    """Draw rows of points with bars of one standard error.

    Args:
        name: of the files.
        labels: of the rows, from above.
        series: points whose ``x`` is the number of a row and whose ``y`` is the value.
        title: a headline.
        text: what is to be seen.
        x: the axis of the values.
        reference: an upright line.

    Returns:
        The figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib("drawing the figures of a report")
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        figure, axes = new_figure(0.85 + 0.21 * len(labels) + 0.2 * (len(series) > 1))
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
            axes.errorbar(
                values, rows, xerr=error, fmt=line.marker or _MARKERS[place % len(_MARKERS)],
                color=COLOURS[line.colour], label=line.name, markersize=4.6, elinewidth=1.1,
            )  # fmt: skip
            placed += [(p.y, p.x + up, f"{p.name}: {x.show_with_error(p.y, p.stderr)}")
                       for p in line.points]  # fmt: skip
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=min(4, len(series)), handlelength=1)
        lay_out(figure)
        marks = marks_at(axes, placed)
    numbers = tuple(
        (labels[int(p.x)], line.name, x.show_with_error(p.y, p.stderr))
        for line in series
        for p in line.points
    )
    return Drawing(name, title, text, figure, marks, None, ("", "series", x.label), numbers)


def _said(line: Line, point: Point, y: Axis) -> str:
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


def _draw_line(axes: "Axes", line: Line, marker: str, most: float) -> None:
    colour = COLOURS[line.colour]
    x = np.array([p.x for p in line.points])
    y = np.array([p.y for p in line.points])
    error = np.nan_to_num([p.stderr for p in line.points])
    above = y > most
    axes.plot(
        x, np.where(above, np.nan, y), marker, linestyle=_STYLES[line.style], color=colour,
        label=line.name,
    )  # fmt: skip
    axes.fill_between(x, y - error, np.minimum(y + error, most), where=~above, color=colour,
                      alpha=0.18, linewidth=0)  # fmt: skip
    axes.plot(x[above], np.full(int(above.sum()), most), "^", color=colour, fillstyle="none")


def _draw_references(
    axes: "Axes", references: Sequence[Reference], points: Sequence[Point]
) -> None:
    """Level lines, named at the end that is farther from all points, above them, or below where
    nothing else is there.
    """
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
            name, (place, value), xycoords=("axes fraction", "data"),
            xytext=(0, -3 if below else 2), textcoords="offset points", ha=align,
            va="top" if below else "bottom", fontsize=8.5,
            color=COLOURS["muted"],
        )  # fmt: skip


def _limit(axes: "Axes", values: Sequence[float], most: float) -> None:
    """The values that are in sight, with a margin; a panel of equal values has some height too."""
    seen = [min(value, most) for value in values if math.isfinite(value)]
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    margin = max(0.07 * (high - low), 0.01 * abs(high), 1e-6)
    axes.set_ylim(low - 1.5 * margin, high + 1.6 * margin)


def series_colour(place: int) -> str:
    """Give the colour of the line in a place, always the same."""
    return SERIES[place % len(SERIES)]
