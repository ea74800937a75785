"""What the figures of a comparison share: the look of each criterion, panels, the legend."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..values.comparison import ComparedModel, CriteriaComparison, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Styles = Mapping[str, tuple[str, str]]
"""Colour and marker by criterion."""

_STYLES = {
    "angular": ("#0072B2", "o"), "cosine": ("#0072B2", "s"), "relative_l2": ("#0072B2", "^"),
    "cka": ("#0072B2", "v"), "block_influence": ("#0072B2", "D"),
    "linear_map": ("#009E73", "o"), "reachable": ("#009E73", "s"),
    "magnitude": ("#E69F00", "o"), "xmerge": ("#E69F00", "s"), "weights": ("#E69F00", "^"),
    "one_shot": ("#CC79A7", "o"), "mask_regression": ("#CC79A7", "s"), "taylor": ("#CC79A7", "^"),
    "greedy": ("#D55E00", "o"), "exhaustive": ("#D55E00", "s"), "evolution": ("#D55E00", "^"),
    "deepest": ("#000000", "o"), "random": ("#000000", "X"),
}  # fmt: skip
"""Colours of Okabe and Ito by kind of criterion, that tell kinds apart for everybody; markers
tell the criteria of one kind apart."""

_OTHERS = tuple((colour, marker) for marker in "P*h<>dp8" for colour in ("#56B4E9", "#7F7F7F"))
"""Styles of criteria that are not known here, in the order in which they come."""

POINT: Any = {"linewidth": 1.3, "markeredgecolor": "white", "markeredgewidth": 0.6, "alpha": 0.95}
"""How points and lines look, whatever their colour."""

GREY, FRONT = "#555555", "#999999"
"""Colours of words beside the points, and of a front."""

_WIDTH, _GAP, _EDGE, DPI = 10.0, 0.95, 0.45, 144
"""Inches of the figure's width, between panels and above them; dots to an inch."""

NAME_SIZE = 9
"""Points of a name's size."""


@dataclass(frozen=True)
class Group:
    """The rows of one model and one calibration text.

    Attributes:
        model: the whole model.
        title: of its panels.
        rows: every choice.
    """

    model: ComparedModel
    title: str
    rows: Sequence[Row]

    def of(self, criterion: str) -> list[Row]:
        """The rows of a criterion, by the number of layers."""
        rows = [row for row in self.rows if row.criterion == criterion]
        return sorted(rows, key=lambda row: row.n)

    def means(self) -> dict[str, tuple[float, float]]:
        """By criterion the means of layer-forwards and of regret, where all sizes are known."""
        sizes = {row.n for row in self.rows}
        found = {}
        for criterion in dict.fromkeys(row.criterion for row in self.rows):
            rows = self.of(criterion)
            regrets = [row.regret for row in rows]
            if {row.n for row in rows} == sizes and np.isfinite(regrets).all():
                cost = sum(row.layer_forwards for row in rows) / len(rows)
                found[criterion] = cost, sum(regrets) / len(rows)
        return found


def groups_of(comparison: CriteriaComparison) -> list[Group]:
    """Sort the rows of a comparison by model and calibration text.

    Args:
        comparison: of criteria.

    Returns:
        A group for each model and text that has rows.
    """
    several = len({row.texts for row in comparison.rows}) > 1
    found = []
    for model in comparison.models:
        of_model = [row for row in comparison.rows if row.model == model.name]
        for texts in dict.fromkeys(row.texts for row in of_model):
            title = f"{model.title}, chosen on {texts}" if several else model.title
            rows = [row for row in of_model if row.texts == texts]
            found.append(Group(model, title, rows))
    return found


def styles_of(comparison: CriteriaComparison) -> dict[str, tuple[str, str]]:
    """Choose how each criterion looks, always the same for those of this package.

    Args:
        comparison: of criteria.

    Returns:
        Colour and marker by criterion, in the order of the legend.
    """
    named = dict.fromkeys(row.criterion for row in comparison.rows)
    known = {name: style for name, style in _STYLES.items() if name in named}
    others = [name for name in named if name not in known]
    return known | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}


def grid(
    groups: int, rows: int, columns: int, *, height: float, right: float
) -> tuple["Figure", Any]:
    """Make a figure with panels of a fixed size, and room for the legend below.

    Args:
        groups: of rows, one below the other.
        rows: of panels in each group.
        columns: of panels.
        height: of a panel, in inches.
        right: room on the right, in inches.

    Returns:
        The figure and its panels, (groups · rows, columns).
    """
    from matplotlib.figure import Figure

    count, legend = groups * rows, 1.75
    full = count * height + (count - 1) * _GAP + _EDGE + legend
    figure = Figure(figsize=(_WIDTH, full), dpi=DPI)
    axes = figure.subplots(
        count, columns, squeeze=False,
        gridspec_kw={
            "left": 0.75 / _WIDTH, "right": 1 - right / _WIDTH, "top": 1 - _EDGE / full,
            "bottom": legend / full, "hspace": _GAP / height, "wspace": 0.08,
        },
    )  # fmt: skip
    return figure, axes


def add_legend(figure: "Figure", styles: Styles, *, front: str = "") -> None:
    """Name all criteria below the panels.

    Args:
        figure: of :func:`grid`.
        styles: of the criteria.
        front: what a front is, if one is drawn.
    """
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, label=name, markersize=7, **POINT)
        for name, (colour, marker) in styles.items()
    ]
    if front:
        handles.append(Line2D([], [], color=FRONT, linewidth=1.6, label=front))
    columns = max(1, math.ceil(len(handles) / 4))
    figure.legend(
        handles=handles, loc="lower center", ncols=min(columns, 5), frameon=False, fontsize=10,
        columnspacing=1.4, handlelength=1.8,
    )  # fmt: skip
