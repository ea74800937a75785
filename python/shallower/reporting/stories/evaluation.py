"""What an evaluation found: lines and a table for people, plain JSON values for machines."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...values.layers import ranges
from ...values.perplexity import Perplexity
from ...values.scores import Difference
from ...values.task_scores import TaskScores
from ..story import Cell, Number, Table
from ..words import loss_words

Values = Mapping[str, Mapping[str, Any]]
"""By ``loss``, ``perplexity`` and ``tasks`` what was found of the ``base`` and of the ``cut``."""


def evaluation_json(values: Values) -> dict[str, Any]:
    """Give ``base``, ``cut`` and ``difference`` of the loss; the same under ``perplexity``, and for
    every task and measure in the list ``tasks``.
    """
    plain: dict[str, Any] = {}
    for kind, sides in values.items():
        if kind == "tasks":
            plain[kind] = [
                {"task": one["base"].task, "metric": one["base"].metric, **_compared(one)}
                for one in _by_measure(sides)
            ]
        else:
            plain |= _compared(sides) if kind == "loss" else {kind: _compared(sides)}
    return plain


def evaluation_parts(values: Values, dropped: Sequence[int] = ()) -> list[str | Table]:
    """Give lines and the table of tasks; the cut is without the layers ``dropped``."""
    parts: list[str | Table] = []
    words: dict[str, Callable[[Any], str]] = {"loss": loss_words, "perplexity": _perplexity_words}
    for kind, sides in values.items():
        if kind == "tasks":
            parts.append(tasks_table(sides["base"], sides.get("cut"), dropped))
            continue
        for side, one in sides.items():
            layers = f"without {ranges(dropped)}" if side == "cut" else "all layers"
            parts.append(f"{layers}: {words[kind](one)}")
        if "cut" in sides:
            by = "text" if kind == "loss" else "window"
            parts.append(_difference(sides["cut"].minus(sides["base"]), by))
    return parts


def _perplexity_words(found: Perplexity) -> str:
    bos = "with" if found.bos else "without"
    return (
        f"perplexity {found}, {len(found.by_window)} windows of {found.context} tokens, stride "
        f"{found.stride}, {bos} a beginning-of-text token; {found.num_tokens} tokens predicted, "
        f"{found.num_rest} left over"
    )


def tasks_table(
    base: Sequence[TaskScores], cut: Sequence[TaskScores] | None, dropped: Sequence[int]
) -> Table:
    """Tabulate scores by task and measure, the main measure of a task first."""
    head = ["task", "measure", "items", "all layers"]
    if cut is not None:
        head += [f"without {ranges(dropped)}", "difference"]
    rows: list[tuple[Cell, ...]] = []
    for sides in _by_measure({"base": base} if cut is None else {"base": base, "cut": cut}):
        one: TaskScores = sides["base"]
        shots = f" {one.num_shots}-shot" if one.num_shots else ""
        row: list[Cell] = [one.task, f"{one.metric}{shots}", Number.count(len(one.items))]
        row += map(_score, sides.values())
        if cut is not None:
            lost = sides["cut"].minus(one)
            row.append(Number(f"{'= ' if lost.tied else ''}{_percent(lost)}", lost.mean))
        rows.append(tuple(row))
    tied = "" if cut is None else "; = a tie"
    title = f"tasks, in per cent; in brackets no better than a guess{tied}"
    return Table(title, tuple(head), tuple(rows))


def _by_measure(sides: Mapping[str, Sequence[TaskScores]]) -> Iterator[dict[str, TaskScores]]:
    """Give the sides of every task and measure."""
    for scores in zip(*sides.values(), strict=True):
        yield dict(zip(sides, scores, strict=True))


def _compared(sides: Mapping[str, Any]) -> dict[str, Any]:
    plain = {side: one.to_json() for side, one in sides.items()}
    if "cut" in sides:
        plain["difference"] = sides["cut"].minus(sides["base"]).to_json()
    return plain


def _difference(lost: Difference, by: str) -> str:
    tie = "; a tie, within two standard errors" if lost.tied else ""
    return f"difference: {lost} nats a token, paired by {by}{tie}"


def _percent(lost: Difference) -> str:
    error = f" ± {100 * lost.stderr:.1f}" if math.isfinite(lost.stderr) else ""
    return f"{100 * lost.mean:+.1f}{error}"


def _score(scores: TaskScores) -> Number:
    """Write a score; one at chance in brackets."""
    text = str(scores).removesuffix(" %")
    return Number(f"({text})" if scores.at_chance else text, scores.mean)
