"""Figures of a curve: loss and tasks over what goes, a line for each strategy and state."""

from collections.abc import Callable
from typing import Literal

from ...values.curve import Curve, CurvePoint
from ...values.layers import ranges
from ...values.settings import STATES, State
from ..words import patch_words, patched_name
from .drawing import Drawing
from .plots import Axis, Line, Point, in_sight, is_one_figure, line_chart, series_colour

_SIZES = (
    ("loss_over_layers", "layers", "dropped", "layers_share"),
    ("loss_over_size", "parameters", "dropped", "parameters_share"),
    ("loss_over_time", "a token's time", "saved, as forecast for an A100", "time_share"),
)
"""Figures of the loss by what goes: their names, what it is and how, and where it is known."""

STATE_STYLES: dict[str, Literal["solid", "dashed", "dotted"]] = {
    "cut": "dashed",
    "patched": "solid",
    "healed": "dotted",
}

Placed = Callable[[CurvePoint], Point | None]
"""Where a cut stands in a figure; None where it is not known there."""


def curve_charts(curve: Curve) -> list[Drawing]:
    """Draw the loss over layers, parameters if their share is another, and time; tasks and
    acceptance over layers.
    """
    if not any(len(points) > 1 for _, _, points in _lines(curve)):
        return []
    return [*_loss_charts(curve), *_task_charts(curve), *_speech_charts(curve)]


def _lines(curve: Curve) -> list[tuple[str, State, tuple[CurvePoint, ...]]]:
    """Every strategy and state with its cuts, the whole model first."""
    return [
        (strategy, state, curve.line(strategy, state))
        for strategy in curve.strategies
        for state in STATES
    ]


def _drawn(curve: Curve, placed: Placed) -> list[Line]:
    """The lines of a figure that have more than the whole model."""
    found = []
    for strategy, state, points in _lines(curve):
        known = tuple(one for point in points if (one := placed(point)) is not None)
        colour = series_colour(curve.strategies.index(strategy))
        if len(points) > 1 and len(known) > 1:
            name = f"{strategy}, {patched_name(curve.settings) if state == 'patched' else state}"
            found.append(Line(name, known, colour, STATE_STYLES[state]))
    return found


def _loss_charts(curve: Curve) -> list[Drawing]:
    whole, drawings = curve.whole.loss, []
    for name, what, verb, size in _SIZES:
        if any(getattr(one, size) is None for one in curve.points if one.loss):
            continue
        shares = ((one.layers_share, one.parameters_share) for one in curve.points if one.loss)
        if size == "parameters_share" and is_one_figure(shares):
            continue
        lines = _drawn(curve, lambda point, size=size: _loss_point(point, size))  # type: ignore[misc]
        if whole is None or not lines:
            continue
        drawings.append(
            line_chart(
                name,
                lines,
                title=f"Normalised loss over the share of {what} {verb}",
                text=f"Loss divided by ln V, so that 1 is a uniform guess, with bands of one "
                f"standard error. A line is a strategy; dashed as it is cut, solid after a "
                f"{patch_words(curve.settings)}, dotted after a healing.",
                x=Axis(f"{what} {verb}", is_share=True),
                y=Axis("loss / ln V"),
                most=in_sight(lines, whole.normalized, 1.0),
                references=[(whole.normalized, "whole model")],
            )
        )
    return drawings


def _task_charts(curve: Curve) -> list[Drawing]:
    drawings = []
    for place, task in enumerate(curve.whole.tasks):
        lines = _drawn(curve, lambda point, name=task.task: _task_point(point, name))  # type: ignore[misc]
        if not lines:  # no cut could be made or scored
            continue
        references = [(task.mean, "whole model")]
        references += [] if task.chance is None else [(task.chance, "chance")]
        drawings.append(
            line_chart(
                f"task_{place}",
                lines,
                title=f"{task.task}, {task.metric}, over the share of layers that go",
                text="Mean over items with bands of one standard error; dotted level lines are the "
                f"whole model and chance. Dashed as cut, solid after a "
                f"{patch_words(curve.settings)}.",
                x=Axis("layers dropped", is_share=True),
                y=Axis(f"{task.task}, {task.metric}", is_share=True),
                references=references,
            )
        )
    return drawings


def _speech_charts(curve: Curve) -> list[Drawing]:
    lines = _drawn(curve, _speech_point)
    if not lines:
        return []
    return [
        line_chart(
            "acceptance",
            lines,
            title="Acceptance over the share of layers that go",
            text="The share of its own words that the whole model would accept from a cut, by "
            "speculative decoding, with bands of one standard error. Dashed as cut, solid after a "
            f"{patch_words(curve.settings)}.",
            x=Axis("layers dropped", is_share=True),
            y=Axis("acceptance", is_share=True),
        )
    ]


def _speech_point(point: CurvePoint) -> Point | None:
    if point.speech is None:
        return None
    found = point.speech.of("acceptance")
    return Point(point.layers_share, found.mean, found.stderr, _named(point))


def _loss_point(point: CurvePoint, size: str) -> Point | None:
    loss, x = point.loss, getattr(point, size)
    if loss is None:
        return None
    return Point(x, loss.normalized, loss.normalized_stderr, _named(point))


def _task_point(point: CurvePoint, name: str) -> Point | None:
    scores = point.task(name)
    if scores is None:
        return None
    return Point(point.layers_share, scores.mean, scores.stderr, _named(point))


def _named(point: CurvePoint) -> str:
    return f"without {ranges(point.dropped)}" if point.n else "whole model"
