"""Figures of criteria that were compared: true losses, loss over what goes, regret over cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...values.comparison import ComparedModel, CriteriaComparison, Row
from ...values.scores import Standing
from .drawing import SERIES, Drawing, require_matplotlib
from .plots import Axis, Line, Point, dot_chart, front_chart, in_sight, line_chart, series_colour

Styles = Mapping[str, tuple[str, str]]
"""Colour and marker by criterion."""

_STYLES = {
    "angular": ("blue", "o"), "cosine": ("blue", "s"), "relative_l2": ("blue", "^"),
    "cka": ("blue", "v"), "block_influence": ("blue", "D"),
    "linear_map": ("green", "o"), "reachable": ("green", "s"),
    "magnitude": ("orange", "o"), "xmerge": ("orange", "s"), "weights": ("orange", "^"),
    "one_shot": ("pink", "o"), "mask_regression": ("pink", "s"), "taylor": ("pink", "^"),
    "greedy": ("violet", "o"), "exhaustive": ("violet", "s"), "evolution": ("violet", "^"),
    "deepest": ("ink", "o"), "random": ("ink", "X"), "layers": ("ink", "D"),
    "frequency": ("blue", "o"), "soft-frequency": ("blue", "s"),
    "ean": ("orange", "o"), "man": ("orange", "s"), "msan": ("orange", "^"),
    "reap": ("green", "o"), "easy-ep": ("green", "s"),
    "reconstruction": ("pink", "o"), "aimer": ("olive", "o"),
}  # fmt: skip
"""Colours tell kinds of criteria apart, markers the criteria of one kind."""

_OTHERS = tuple((colour, marker) for marker in "P*h<>dp8" for colour in ("olive", "muted"))
"""Styles of criteria that are not known here, in the order in which they come."""


DIVERGENCES = ("kl", "speech")
"""Judges whose scores are divergences from the whole model."""


@dataclass(frozen=True)
class Group:
    """The rows of one model and one calibration text.

    Attributes:
        model: the whole model.
        title: of its figures and tables.
        rows: every choice.
        by_patch: whether the cuts are ranked after the quick patch, as everyone uses them who
            patches, and not as bare cuts: the judge is the loss, and of every size one was patched.
        unit: of a regret.
    """

    model: ComparedModel
    title: str
    rows: Sequence[Row]
    by_patch: bool
    unit: str

    @property
    def when(self) -> str:
        """The state by which the cuts are ranked, in words."""
        return "after a quick patch" if self.by_patch else "as bare cuts"

    def standing(self, row: Row) -> Standing | None:
        """How a cut stands in the state by which cuts are ranked; None where it is not known."""
        found = row.patched if self.by_patch else row.cut
        return found if found is not None and found.is_ranked else None

    def ranked(self, n: int, *, by_patch: bool | None = None) -> list[tuple[Row, Standing]]:
        """The cuts of a size whose standing is known, of least regret first.

        In the state by which cuts are ranked, or in one that is named.
        """
        wanted = self if by_patch is None else replace(self, by_patch=by_patch)
        of_size = [row for row in self.rows if row.n == n]
        known = [(row, one) for row in of_size if (one := wanted.standing(row)) is not None]
        return sorted(known, key=lambda one: one[1].regret.mean)

    def of(self, criterion: str) -> list[Row]:
        """The rows of a criterion, by the number of layers."""
        rows = [row for row in self.rows if row.criterion == criterion]
        return sorted(rows, key=lambda row: row.n)

    def standings(self, criterion: str) -> list[Standing]:
        """How its cuts stand, where that is known."""
        return [one for row in self.of(criterion) if (one := self.standing(row)) is not None]

    def means(self) -> dict[str, tuple[float, float]]:
        """By criterion the means of layer-forwards and of regret, where all sizes are known."""
        sizes = {row.n for row in self.rows}
        found = {}
        for criterion in dict.fromkeys(row.criterion for row in self.rows):
            rows, known = self.of(criterion), self.standings(criterion)
            if {row.n for row in rows} == sizes and len(known) == len(rows):
                cost = sum(row.layer_forwards for row in rows) / len(rows)
                found[criterion] = cost, sum(one.regret.mean for one in known) / len(rows)
        return found

    def by_regret(self) -> list[str]:
        """The criteria by their mean regret; those that have none last."""
        means = self.means()
        names = dict.fromkeys(row.criterion for row in self.rows)
        return sorted(names, key=lambda name: means[name][1] if name in means else math.inf)


def groups_of(comparison: CriteriaComparison) -> list[Group]:
    """Sort the rows of a comparison by model and calibration text."""
    several = len({row.texts for row in comparison.rows}) > 1
    found = []
    for model in comparison.models:
        of_model = [row for row in comparison.rows if row.model == model.name]
        for texts in dict.fromkeys(row.texts for row in of_model):
            title = f"{model.title}, chosen on {texts}" if several else model.title
            rows = [row for row in of_model if row.texts == texts]
            sizes = {row.n for row in rows}
            patched = {row.n for row in rows if row.patched and row.patched.is_ranked}
            by_patch = comparison.judge == "loss" and patched == sizes
            of = " of divergence" if comparison.judge in DIVERGENCES else ""
            found.append(Group(model, title, rows, by_patch, f"{comparison.unit}{of}"))
    return found


def styles_of(criteria: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Choose colour and marker of each criterion; a colour of its own, where there are enough."""
    known = {name: style for name, style in _STYLES.items() if name in criteria}
    free = [one for one in SERIES if one not in {colour for colour, _ in known.values()}]
    seen: set[str] = set()
    for name, (colour, marker) in known.items():
        if colour in seen and free:
            known[name] = free.pop(0), marker
        seen.add(colour)
    others = [name for name in criteria if name not in known]
    return known | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}


def draw_comparison(comparison: CriteriaComparison, folder: str | Path) -> list[Path]:
    """Write losses over what is dropped, and regret over cost, into the folder of a comparison.

    Each is an SVG and a PNG, of the second model or text on with its number behind the name; the
    same comparison gives the same bytes. Where no model was compared there are none.
    """
    require_matplotlib("drawing a comparison")
    written = []
    for place, group in enumerate(groups_of(comparison)):
        for drawing in (*loss_charts(group, place), *cost_charts(group, place)):
            written += drawing.save(Path(folder))
    return written


def group_charts(group: Group, place: int) -> list[Drawing]:
    """Draw all figures of one model and text; their names end in its place from the second on."""
    return [
        _true_losses(group, place),
        *loss_charts(group, place),
        *cost_charts(group, place),
    ]


def loss_charts(group: Group, place: int) -> list[Drawing]:
    """Draw losses as cut, and after a quick patch, over the share of layers."""
    styles, model = styles_of([row.criterion for row in group.rows]), group.model
    what = "layers" if model.num_experts is None else "parameters"
    guess = math.log(model.whole.vocab_size)
    most = guess if model.whole.nats < guess else math.inf
    states = (
        ("loss_over_dropped", "as cut", "before a patch", False),
        ("loss_over_dropped_patched", "after a quick patch", "after a quick patch", True),
    )
    found = []
    for name, title, when, patched in states:
        lines = [_line(group, criterion, styles, patched) for criterion in group.by_regret()]
        lines = [line for line in lines if line.points]
        if lines:
            found.append(
                line_chart(
                    _named(name, place),
                    lines,
                    title=f"Loss over the share of {what}, {title}: {group.title}",
                    text=f"Loss in nats a token over the share of {what} that a criterion drops, "
                    f"{when}, with bands of one standard error. Each line is a criterion, those "
                    f"of least mean regret {group.when} named first.",
                    x=Axis(f"{what} dropped", is_share=True),
                    y=Axis("loss, nats a token"),
                    references=[(model.whole.nats, "whole model")],
                    most=in_sight(lines, model.whole.nats, most),
                )
            )
    return found


def cost_charts(group: Group, place: int) -> list[Drawing]:
    """Draw mean regret over what a choice costs, with the Pareto front; nothing where no criterion
    has chosen for all sizes.
    """
    points = group.means()
    if not points:
        return []
    sizes = ", ".join(str(n) for n in sorted({row.n for row in group.rows}))
    return [
        front_chart(
            _named("regret_over_cost", place),
            points,
            styles_of(list(points)),
            title=f"Mean regret {group.when} over n = {sizes}, against its cost: {group.title}",
            text=f"Mean regret of each criterion over all sizes, {group.when}, against the "
            f"layer-forwards that its choices cost. A line joins those that no other beats in "
            f"both; a criterion without a regret of every size is left out.",
            x=Axis("cost of a choice, layer-forwards", digits=0),
            y=Axis(f"regret {group.when}, {group.unit}"),
        )
    ]


def _named(name: str, place: int) -> str:
    return f"{name}_{place + 1}" if place else name


def _line(group: Group, criterion: str, styles: Styles, patched: bool) -> Line:
    points = []
    for row in group.of(criterion):
        standing = row.patched if patched else row.cut
        if standing is not None and not math.isnan(standing.loss.mean):
            share = row.layers_share if group.model.num_experts is None else row.parameters_share
            found = standing.loss
            points.append(Point(share, found.mean, found.stderr, f"without {row.words}"))
    colour, marker = styles[criterion]
    return Line(criterion, tuple(points), colour, "solid" if patched else "dashed", marker)


def _true_losses(group: Group, place: int) -> Drawing:
    """Draw a row for each criterion, a point for each size: what its choice loses."""
    names, series = group.by_regret(), []
    for number, n in enumerate(sorted({row.n for row in group.rows})):
        points = tuple(
            Point(
                names.index(row.criterion),
                standing.difference.mean,
                standing.difference.stderr,
                f"{row.criterion}, n = {n}, {row.words}",
            )
            for row, standing in group.ranked(n)
            if math.isfinite(standing.difference.mean)
        )
        series.append(Line(f"n = {n}", points, series_colour(number)))
    return dot_chart(
        _named("criteria_against_loss", place),
        names,
        series,
        title=f"What each criterion's choice truly loses {group.when}: {group.title}",
        text=f"Each row is a criterion, the one of least mean regret above; each point the loss of "
        f"the cut that it chose, {group.when}, above the whole model, with one paired standard "
        f"error.",
        x=Axis("more than the whole model, nats a token"),
        reference=(0.0, "whole model"),
    )
