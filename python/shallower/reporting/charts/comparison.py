"""Figures of criteria that were compared: true losses, loss over what goes, regret over cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

from ...results.comparison import ComparedModel, CriteriaComparison, Row
from ...results.scores import Scores, Standing
from ...results.task_scores import TaskScores
from ...settings.studies import STATES, State
from ..words import patch_words, patched_name
from .drawing import SERIES, Drawing
from .plots import (
    Axis,
    Line,
    Point,
    dot_chart,
    front_chart,
    in_sight,
    is_one_figure,
    line_chart,
    series_colour,
)

Styles = Mapping[str, tuple[str, str]]
"""Colour and marker by criterion."""

_STYLES = {
    "angular": ("blue", "o"), "cosine": ("blue", "s"), "relative_l2": ("blue", "^"),
    "cka": ("blue", "v"), "block_influence": ("blue", "D"),
    "linear_map": ("green", "o"), "reachable": ("green", "s"),
    "magnitude": ("orange", "o"), "xmerge": ("orange", "s"), "weights": ("orange", "^"),
    "one_shot": ("pink", "o"), "mask_regression": ("pink", "s"), "taylor": ("pink", "^"),
    "greedy": ("violet", "o"), "exhaustive": ("violet", "s"), "evolution": ("violet", "^"),
    "recommended": ("ink", "*"), "best_plan": ("blue", "P"),
    "deepest": ("ink", "o"), "random": ("ink", "X"), "layers": ("ink", "D"),
    "frequency": ("blue", "o"), "soft-frequency": ("blue", "s"),
    "ean": ("orange", "o"), "man": ("orange", "s"), "msan": ("orange", "^"),
    "reap": ("green", "o"), "easy-ep": ("green", "s"),
    "reconstruction": ("pink", "o"), "aimer": ("olive", "o"),
}  # fmt: skip
"""A colour for each kind of criteria, a marker for each criterion of a kind."""

_OTHERS = tuple((colour, marker) for marker in "P*h<>dp8" for colour in ("olive", "muted"))
"""Styles of criteria that are not known here, in the order in which they come."""


DIVERGENCES = ("kl", "speech")
"""Judges whose scores are divergences from the whole model."""


@dataclass(frozen=True)
class Group:
    """The rows of one model and one calibration text."""

    model: ComparedModel
    title: str  # of figures and tables
    rows: Sequence[Row]  # every choice in every state
    settings: Mapping[str, Any]  # those that are shown
    judge: str
    state: State  # the state that ranks cuts; bare, unless the loss judges
    unit: str  # of a regret in that state

    @property
    def when(self) -> str:
        """The state by which the cuts are ranked, in words."""
        return self.words(self.state)

    def words(self, state: State, *, one: bool = False) -> str:
        """Say in which state cuts are, or ``one`` is, and after which patch."""
        patch, bare = patch_words(self.settings), "as a bare cut" if one else "as bare cuts"
        return {"cut": bare, "patched": f"after a {patch}",
                "healed": f"healed after a {patch}"}[state]  # fmt: skip

    @property
    def sizes(self) -> list[int]:
        """The sizes of which some cut has a loss, ascending."""
        return sorted({row.n for row in self.rows if row.standing is not None})

    @property
    def states(self) -> tuple[State, ...]:
        """The states that some row has a loss in."""
        measured = {row.state for row in self.rows if row.standing is not None}
        return tuple(state for state in STATES if state in measured)

    def ranked(self, n: int, state: State | None = None) -> list[tuple[Row, Standing]]:
        """The cuts of a size whose standing is known, of least regret first.

        In the state by which cuts are ranked, or in one that is named.
        """
        of_size = [row for row in self.rows if (row.n, row.state) == (n, state or self.state)]
        known = [(row, row.standing) for row in of_size if row.standing and row.standing.is_ranked]
        return sorted(known, key=lambda one: one[1].regret.mean)

    def best(self) -> list[tuple[Row, Standing]]:
        """The best cut of every size, where one was measured."""
        return [ranked[0] for n in self.sizes if (ranked := self.ranked(n))]

    def line(self, criterion: str, state: State) -> list[Row]:
        """The rows of a criterion in a state, by the number of layers."""
        rows = [row for row in self.rows if (row.criterion, row.state) == (criterion, state)]
        return sorted(rows, key=lambda row: row.n)

    def standings(self, criterion: str) -> list[Standing]:
        """How its cuts stand in the state by which cuts are ranked, where that is known."""
        rows = self.line(criterion, self.state)
        return [row.standing for row in rows if row.standing and row.standing.is_ranked]

    @property
    def criteria(self) -> list[str]:
        """The criteria, in the order of the rows."""
        return [*dict.fromkeys(row.criterion for row in self.rows)]

    def means(self) -> dict[str, tuple[float, float]]:
        """By criterion the means of layer-forwards and of regret, where all sizes are known."""
        found = {}
        for criterion in self.criteria:
            rows = [row for row in self.line(criterion, self.state) if row.n in self.sizes]
            known = self.standings(criterion)
            if {row.n for row in rows} == {*self.sizes} and len(known) == len(rows):
                cost = sum(row.layer_forwards for row in rows) / len(rows)
                found[criterion] = cost, sum(one.regret.mean for one in known) / len(rows)
        return found

    def by_regret(self) -> list[str]:
        """The criteria by their mean regret; those that have none last."""
        means = self.means()
        return sorted(self.criteria, key=lambda name: means[name][1] if name in means else math.inf)


def groups_of(comparison: CriteriaComparison) -> list[Group]:
    """Sort the rows of a comparison by model and calibration text."""
    several = len({row.texts for row in comparison.rows}) > 1
    found = []
    for model in comparison.models:
        of_model = [row for row in comparison.rows if row.model == model.name]
        for texts in dict.fromkeys(row.texts for row in of_model):
            title = f"{model.title}, chosen on {texts}" if several else model.title
            rows = [row for row in of_model if row.texts == texts]
            state = _ranked_by(rows) if comparison.judge == "loss" else "cut"
            of = " of divergence" if comparison.judge in DIVERGENCES else ""
            unit, judge = f"{comparison.unit}{of}", comparison.judge
            found.append(Group(model, title, rows, comparison.settings, judge, state, unit))
    return found


def _ranked_by(rows: Sequence[Row]) -> State:
    """The last state in which every size that was measured has a cut."""
    ranked = [(row.state, row.n) for row in rows if row.standing and row.standing.is_ranked]
    sizes = {n for _, n in ranked}
    complete = [state for state in STATES if {n for one, n in ranked if one == state} == sizes]
    return complete[-1] if complete else "cut"


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


def group_charts(group: Group, place: int) -> list[Drawing]:
    """Draw all figures of one model and text; their names end in its place from the second on."""
    if not group.states:
        return []
    drawings = [_true_losses(group)] if len(group.criteria) > 1 else []
    drawings += [*_loss_charts(group), *_task_charts(group), *_speech_charts(group)]
    drawings += _cost_charts(group) if len(group.criteria) > 1 else []
    return [replace(one, name=_named(one.name, place)) for one in drawings]


def _named(name: str, place: int) -> str:
    return f"{name}_{place + 1}" if place else name


STATE_STYLES: dict[str, Literal["solid", "dashed", "dotted"]] = {
    "cut": "dashed",
    "patched": "solid",
    "healed": "dotted",
}

_SIZES = (
    ("layers", "dropped", "layers_share"),
    ("parameters", "dropped", "parameters_share"),
    ("a token's time", "saved, as forecast for an A100", "time_share"),
)
"""What losses are drawn over: what goes, how, and where its share is known."""

MOST_TOGETHER = 4
"""Criteria whose states are drawn in one figure; more have a figure for every state."""

Placed = Callable[[Row], Point | None]
"""Where a cut stands in a figure; None where it is not known there."""


def _lines(group: Group, states: Sequence[State], placed: Placed, whole: Point) -> list[Line]:
    """A line for every criterion and state that has a point, from the whole model on."""
    styles, found = styles_of(group.criteria), []
    for criterion, state in product(group.by_regret(), states):
        points = [one for row in group.line(criterion, state) if (one := placed(row)) is not None]
        if not points:
            continue
        colour, marker = styles[criterion]
        name = patched_name(group.settings) if state == "patched" else state
        label = criterion if len(states) == 1 else f"{criterion}, {name}"
        found.append(Line(label, (whole, *points), colour, STATE_STYLES[state], marker))
    return found


def _together(group: Group) -> list[tuple[str, tuple[State, ...], str]]:
    """The states that are drawn in one figure: an ending of its name, the states, their words."""
    if len(group.criteria) <= MOST_TOGETHER:
        return [("", group.states, "dashed as cut, solid patched, dotted healed")]
    ends = {"cut": "", "patched": "_patched", "healed": "_healed"}
    return [(ends[state], (state,), group.words(state)) for state in group.states]


def _state_charts(
    group: Group,
    name: str,
    placed: Placed,
    whole: Point,
    *,
    text: str,
    most: Callable[[Sequence[Line]], float] = lambda _: math.inf,
    x: Axis | None = None,
    **words: Any,
) -> list[Drawing]:
    """Draw a line for every criterion and state, in one figure or a figure for every state.

    ``{when}`` in the text is where its states are named. What has no point has no figure.
    """
    x = x or Axis("layers dropped", is_share=True)
    return [
        line_chart(
            f"{name}{end}", lines, text=text.format(when=when), most=most(lines), x=x, **words
        )
        for end, states, when in _together(group)
        if (lines := _lines(group, states, placed, whole))
    ]


def _loss_charts(group: Group) -> list[Drawing]:
    """Draw losses over the shares of layers, of parameters if they are others, and of time."""
    whole, found = group.model.whole, list[Drawing]()
    assert whole is not None
    most = 1.0 if whole.normalized < 1 else math.inf
    measured = [row for row in group.rows if row.standing]
    for what, verb, share in _SIZES[1:] if group.model.num_experts else _SIZES:
        if any(getattr(row, share) is None for row in measured):
            continue
        pairs = ((row.layers_share, row.parameters_share) for row in measured)
        if share == "parameters_share" and group.model.num_experts is None and is_one_figure(pairs):
            continue
        found += _state_charts(
            group,
            f"loss_over_{share.removesuffix('_share')}",
            partial(_loss_point, share, math.log(whole.vocab_size)),
            Point(0.0, whole.normalized, whole.normalized_stderr, "whole model"),
            title=f"Loss over the share of {what} {verb}: {group.title}",
            text="Loss divided by ln V, so that 1 is a uniform guess, {when}, with bands of one "
            "standard error. Each line is a criterion, those of least mean regret "
            f"{group.when} named first.",
            x=Axis(f"{what} {verb}", is_share=True),
            y=Axis("loss / ln V"),
            most=lambda lines: in_sight(lines, whole.normalized, most),
            references=[(whole.normalized, "whole model")],
        )
    return found


def _task_charts(group: Group) -> list[Drawing]:
    drawings = []
    for place, task in enumerate(group.model.tasks):
        references = [(task.mean, "whole model")]
        references += [] if task.chance is None else [(task.chance, "chance")]
        drawings += _state_charts(
            group,
            f"task_{place}",
            partial(_task_point, task.task),
            Point(0.0, task.mean, task.stderr, "whole model"),
            title=f"{task.task}, {task.metric}, over the share of layers that go",
            text="Mean over items with bands of one standard error; dotted level lines "
            "are the whole model and chance; {when}.",
            y=Axis(f"{task.task}, {task.metric}", is_share=True),
            references=references,
        )
    return drawings


def _speech_charts(group: Group) -> list[Drawing]:
    if group.model.speech is None:
        return []
    whole = group.model.speech.of("acceptance")
    return _state_charts(
        group,
        "acceptance",
        _speech_point,
        Point(0.0, whole.mean, whole.stderr, "whole model"),
        title="Acceptance over the share of layers that go",
        text="The share of its own words that the whole model would accept from a cut, "
        "by speculative decoding, with bands of one standard error; {when}.",
        y=Axis("acceptance", is_share=True),
    )


def _loss_point(share: str, size: float, row: Row) -> Point | None:
    if row.standing is None or not math.isfinite(row.standing.loss.mean):
        return None
    loss = row.standing.loss
    return Point(getattr(row, share), loss.mean / size, loss.stderr / size, f"without {row.words}")


def _task_point(name: str, row: Row) -> Point | None:
    return _point(row, row.task(name))


def _speech_point(row: Row) -> Point | None:
    return None if row.speech is None else _point(row, row.speech.of("acceptance"))


def _point(row: Row, found: Scores | TaskScores | None) -> Point | None:
    if found is None:
        return None
    return Point(row.layers_share, found.mean, found.stderr, f"without {row.words}")


def _cost_charts(group: Group) -> list[Drawing]:
    """Draw mean regret over the cost of a choice, with the Pareto front; criteria for all sizes."""
    points = group.means()
    if not points:
        return []
    sizes = ", ".join(map(str, group.sizes))
    return [
        front_chart(
            "regret_over_cost",
            points,
            styles_of(list(points)),
            title=f"Mean regret {group.when} over n = {sizes}, against its cost: {group.title}",
            text=f"Mean regret of each criterion over all sizes, {group.when}, against the "
            f"layer-forwards that its choices cost. A line joins those that no other beats in "
            f"both; a criterion without a regret of every size is left out.",
            x=Axis("cost of a choice, layer-forwards", digits=0),
            y=Axis(f"regret, {group.unit}"),
        )
    ]


def _true_losses(group: Group) -> Drawing:
    """Draw a row for each criterion, a point for each size: what its choice loses."""
    names, series = group.by_regret(), []
    for number, n in enumerate(group.sizes):
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
        "criteria_against_loss",
        names,
        series,
        title=f"What each criterion's choice truly loses {group.when}: {group.title}",
        text=f"Each row is a criterion, the one of least mean regret above; each point the loss of "
        f"the cut that it chose, {group.when}, above the whole model, with one paired standard "
        f"error.",
        x=Axis("more than the whole model, nats a token"),
        reference=(0.0, "whole model"),
    )
