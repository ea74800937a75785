"""What an evaluation found, as lines, tables and plain JSON values."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from ..values.layers import ranges
from ..values.loss import Loss
from ..values.perplexity import Perplexity
from ..values.scores import Difference
from ..values.task_scores import TaskScores

Values = Mapping[str, Mapping[str, Any]]
"""By ``loss``, ``perplexity`` and ``tasks`` what was found of the ``base`` and of the ``cut``."""


def plain_results(values: Values) -> dict[str, Any]:
    """Give results as plain JSON values.

    Args:
        values: what was found.

    Returns:
        ``base``, ``cut`` and ``difference`` of the loss; the same under ``perplexity``, and for
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


def told_results(values: Values, dropped: Sequence[int] = ()) -> list[str | Table]:
    """Tell results to people.

    Args:
        values: what was found.
        dropped: the layers that the cut is without.

    Returns:
        Lines, and the table of tasks.
    """
    told: list[str | Table] = []
    tell: dict[str, Callable[[Any], str]] = {"loss": loss_line, "perplexity": perplexity_line}
    for kind, sides in values.items():
        if kind == "tasks":
            told.append(tasks_table(sides["base"], sides.get("cut"), dropped))
            continue
        for side, one in sides.items():
            layers = f"without {ranges(dropped)}" if side == "cut" else "all layers"
            told.append(f"{layers}: {tell[kind](one)}")
        if "cut" in sides:
            by = "text" if kind == "loss" else "window"
            told.append(_difference(sides["cut"].minus(sides["base"]), by))
    return told


def loss_line(loss: Loss) -> str:
    """Tell a loss in a line: in nats a token, by its vocabulary, in bits a byte.

    Args:
        loss: of any model.

    Returns:
        The line.
    """
    rejected = f", {loss.num_rejected} texts rejected" if loss.num_rejected else ""
    bits = "" if loss.by_byte is None else f", {loss.by_byte.mean:.4f} bits a byte"
    return (
        f"{loss} nats a token ({loss.normalized:.4f} of ln vocabulary{bits}), "
        f"{loss.num_tokens} tokens of {loss.num_texts} texts{rejected}"
    )


def perplexity_line(found: Perplexity) -> str:
    """Tell a perplexity in a line, and how it was measured.

    Args:
        found: of any model.

    Returns:
        The line.
    """
    bos = "with" if found.bos else "without"
    return (
        f"perplexity {found}, {len(found.by_window)} windows of {found.context} tokens, stride "
        f"{found.stride}, {bos} a beginning-of-text token; {found.num_tokens} tokens predicted, "
        f"{found.num_rest} left over"
    )


def tasks_table(
    base: Sequence[TaskScores],
    cut: Sequence[TaskScores] | None = None,
    dropped: Sequence[int] = (),
) -> Table:
    """Tabulate scores by task and measure.

    Args:
        base: of the whole model.
        cut: of the model without layers, by the same measures of the same items.
        dropped: those layers.

    Returns:
        A table with a row for every task and measure, the main measure of a task first. A score
        that is no more than two standard errors above that of a guess is in brackets.
    """
    tied = "" if cut is None else "; = a tie"
    table = Table(title=f"tasks, in per cent; in brackets no better than a guess{tied}")
    for name in ("task", "measure", "items", "all layers"):
        table.add_column(name, justify="left" if name in ("task", "measure") else "right")
    if cut is not None:
        table.add_column(f"without {ranges(dropped)}", justify="right")
        table.add_column("difference", justify="right")
    seen = ""
    for sides in _by_measure({"base": base} if cut is None else {"base": base, "cut": cut}):
        one: TaskScores = sides["base"]
        shots = f" {one.num_shots}-shot" if one.num_shots else ""
        row = [
            one.task if one.task != seen else "", f"{one.metric}{shots}", str(len(one.items)),
            *map(_marked, sides.values()),
        ]  # fmt: skip
        seen = one.task
        if cut is not None:
            lost = sides["cut"].minus(one)
            error = f" ± {100 * lost.stderr:.1f}" if math.isfinite(lost.stderr) else ""
            row.append(f"{'= ' if lost.tied else ''}{100 * lost.mean:+.1f}{error}")
        table.add_row(*row)
    return table


def _by_measure(sides: Mapping[str, Sequence[TaskScores]]) -> Iterator[dict[str, TaskScores]]:
    """The sides of every task and measure."""
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


def _marked(scores: TaskScores) -> str:
    """A score; one at chance in brackets."""
    text = str(scores).removesuffix(" %")
    return f"({text})" if scores.at_chance else text
