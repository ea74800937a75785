"""The figure of losses over the share of layers, and of parameters, that is dropped."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..values.comparison import ComparedModel, Row
from .criteria_styles import GREY, NAME_SIZE, POINT, Group, Styles, add_legend, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = 3.5
"""Inches of a panel's height."""


def losses_figure(groups: Sequence[Group], styles: Styles) -> "Figure":
    """Draw losses before and after the quick patch, by layers on the left, by parameters beside.

    Args:
        groups: a pair of rows of panels each.
        styles: colour and marker by criterion.

    Returns:
        The figure. An axis ends at the loss of a uniform guess; what is above is counted in
        the title.
    """
    figure, axes = grid(len(groups), 2, 2, height=_PANEL, right=1.75)
    for place, group in enumerate(groups):
        for patched in (False, True):
            panels = axes[2 * place + patched]
            lines = {name: _line(group.of(name), patched) for name in styles}
            bottom, top = limits = _limits(group.model, lines.values())
            for panel, by_parameters in zip(panels, (False, True), strict=True):
                panel.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
                for name, line in lines.items():
                    _draw(panel, line, styles[name], top, by_parameters=by_parameters)
                panel.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
                panel.set_xlim(left=0)
                panel.set_xlabel(f"{'parameters' if by_parameters else 'layers'} dropped")
            _references(panels, group.model)
            _name_lines(panels[1], lines, styles, limits)
            panels[1].tick_params(labelleft=False)
            panels[0].set_ylabel("loss, nats a token")
            what = "after a quick patch" if patched else "cut, not healed"
            above = sum(int((line.y > top).sum()) for line in lines.values())
            note = f"; △ {above} losses above {top:.1f}" if above else ""
            panels[0].set_title(f"{group.title}: {what}{note}", loc="left", fontweight="bold")
    add_legend(figure, styles)
    return figure


@dataclass(frozen=True)
class _Line:
    """Losses of one criterion by the share of layers and of parameters that go."""

    layers: NDArray[np.float64]
    parameters: NDArray[np.float64]
    y: NDArray[np.float64]
    error: NDArray[np.float64]
    patched: bool


def _line(rows: Sequence[Row], patched: bool) -> _Line:
    losses = [
        (row.layers_share, row.parameters_share, loss, stderr)
        for row in rows
        for loss, stderr in [
            (row.patched, row.patched_stderr) if patched else (row.loss, row.stderr)
        ]
        if loss is not None and not math.isnan(loss)
    ]
    columns = np.array(losses, dtype=np.float64).reshape(-1, 4).T
    layers, parameters, y, error = columns
    return _Line(layers, parameters, y, np.nan_to_num(error), patched)


def _limits(model: ComparedModel, lines: Iterable[_Line]) -> tuple[float, float]:
    """From the least loss, the whole model's among them, to the largest up to that of a guess."""
    guess = math.log(model.whole.vocab_size)
    losses = np.concatenate([[model.whole.nats], *(line.y for line in lines)])
    bottom = float(losses.min())
    return bottom, max(min(float(losses.max()), guess), bottom + 0.1)


def _draw(
    axes: "Axes", line: _Line, style: tuple[str, str], top: float, *, by_parameters: bool
) -> None:
    """A line with its errors; what is above the axis as a triangle at its edge."""
    colour, marker = style
    x = line.parameters if by_parameters else line.layers
    above = line.y > top
    axes.errorbar(
        x, np.where(above, np.nan, line.y), line.error, color=colour, marker=marker, markersize=6,
        linestyle="--" if line.patched else "-", elinewidth=0.9, **POINT,
    )  # fmt: skip
    axes.plot(
        x[above], np.full(int(above.sum()), top), marker="^", markersize=8, linestyle="none",
        markerfacecolor="white", markeredgecolor=colour, markeredgewidth=1.3, zorder=4,
    )  # fmt: skip


def _references(panels: Sequence["Axes"], model: ComparedModel) -> None:
    """Lines of the whole model and of a guess, where the latter is in sight."""
    guess = math.log(model.whole.vocab_size)
    lines = ((model.whole.nats, "whole model", ":"), (guess, "uniform guess: ln V =", "-."))
    for value, label, style in lines:
        low, high = panels[0].get_ylim()
        if not low <= value <= high:
            continue
        for panel in panels:
            panel.axhline(value, color=GREY, linestyle=style, linewidth=1.3, zorder=1)
        panels[0].annotate(
            f"{label} {value:.2f}", (0.015, value), xycoords=("axes fraction", "data"),
            xytext=(0, -3), textcoords="offset points", va="top", fontsize=9, color=GREY,
        )  # fmt: skip


def _name_lines(
    axes: "Axes", lines: dict[str, _Line], styles: Styles, limits: tuple[float, float]
) -> None:
    """Name every line at its right end, the names one above the other."""
    ends = {name: min(float(line.y[-1]), limits[1]) for name, line in lines.items() if line.y.size}
    names = sorted(ends, key=lambda name: ends[name])
    low, high = axes.get_ylim()
    step = NAME_SIZE / 72 * 1.18 / _PANEL
    places = spread([(ends[name] - low) / (high - low) for name in names], step)
    for name, place in zip(names, places, strict=True):
        end = float(lines[name].parameters[-1])
        axes.annotate(
            name, (end, ends[name]), xytext=(1.06, place), textcoords="axes fraction",
            va="center", fontsize=NAME_SIZE, color="#333333", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": styles[name][0], "linewidth": 0.9,
                "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def spread(places: Sequence[float], step: float) -> list[float]:
    """Move places apart, as little as it takes, within 0 to 1 while there is room.

    Args:
        places: ascending.
        step: the least distance between two of them.

    Returns:
        Places in the same order, at least ``step`` apart.
    """
    # Runs that touch are joined, and each is centred where its members would be.
    runs: list[list[float]] = []  # mean of the first's place, number
    for place in places:
        runs.append([place, 1])
        while len(runs) > 1 and runs[-2][0] + runs[-2][1] * step > runs[-1][0]:
            start, size = runs.pop()
            before = runs[-1]
            total = before[1] + size
            before[0] = (before[0] * before[1] + (start - before[1] * step) * size) / total
            before[1] = total
    found = [start + i * step for start, size in runs for i in range(int(size))]
    # What leaves at an end is pushed back, and pushes what is there.
    for i, place in enumerate(found):
        least = found[i - 1] + step if i else 0.0
        found[i] = max(place, least)
    most = max(1.0, (len(found) - 1) * step)
    for i in reversed(range(len(found))):
        found[i] = min(found[i], most)
        most = found[i] - step
    return found
