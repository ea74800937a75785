"""Tables and CSV of what a model loses over the layers that go."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ..storage import write_file
from ..values.curve import STATES, Curve, CurvePoint, State
from ..values.layers import ranges
from ..values.loss import with_error
from ..values.scores import TIE, Difference
from ..values.task_scores import TaskScores

_OF_STATE = {"cut": "as they are cut", "patched": "patched", "healed": "healed"}


def curve_tables(curve: Curve) -> list[Table]:
    """Tabulate a curve, in 80 columns.

    Args:
        curve: of one model.

    Returns:
        For every state a table of losses, a row for each size and strategy, and one of each task;
        at the end what could not be measured, and why.
    """
    states = [state for state in STATES if _cuts(curve, state)]
    tables = [_losses(curve, state) for state in states]
    tables += [_scores(curve, name, state) for name in curve.tasks for state in states]
    if tables:
        tables[0].title = Text(f"{_about(curve)}\n{tables[0].title}")
    failed = [point for point in curve.points if point.failed]
    return [*tables, *([_failures(failed)] if failed else [])]


def write_csv(curve: Curve, path: str | Path) -> None:
    """Write the points of a curve as CSV, a line each.

    The indices of dropped layers stand in one cell, joined by spaces; behind the losses are four
    columns for every task. What could not be measured is an empty cell; figures have all their
    digits.

    Args:
        curve: of one model.
        path: the file, replaced where there is one.

    Raises:
        OutputError: the file cannot be written.
    """
    text = io.StringIO()
    rows = [_row(curve, point) for point in curve.points]
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(Path(path), text.getvalue().encode())


def _row(curve: Curve, point: CurvePoint) -> dict[str, Any]:
    """The cells of a line; None is an empty one."""
    loss, lost = point.loss, curve.lost(point)
    found = {
        "n": point.n, "strategy": point.strategy, "state": point.state,
        "dropped": " ".join(map(str, point.dropped)), "layers_share": point.layers_share,
        "parameters_share": point.parameters_share if point.dropped or not point.n else None,
        "time_share": point.time_share, "loss": loss and loss.nats, "stderr": loss and loss.stderr,
        "of_ln_vocabulary": loss and loss.normalized,
        "lost": lost and lost.mean, "lost_stderr": lost and lost.stderr,
        "seconds": point.seconds, "failed": point.failed,
    }  # fmt: skip
    for name in curve.tasks:
        scores, less = point.task(name), _less(curve, point, name)
        found |= {
            name: scores and scores.mean, f"{name}_stderr": scores and scores.stderr,
            f"{name}_difference": less and less.mean,
            f"{name}_difference_stderr": less and less.stderr,
        }  # fmt: skip
    return found


def _about(curve: Curve) -> str:
    """The model and what all was measured on, as lines above the tables."""
    whole = curve.whole.loss
    lines = [f"{curve.model}: {curve.num_layers} layers, {curve.dtype}"]
    if whole is not None:
        lines += [
            f"loss of the whole model {whole} nats a token, {whole.normalized:.3f} of ln V",
            f"on {whole.num_tokens} tokens of {whole.num_texts} texts; V = {whole.vocab_size}",
        ]
    words = {"fit": "to fit", "choose": "to choose", "report": "to report"}
    lines.append(
        ", ".join(f"{n} texts {words.get(name, name)}" for name, n in curve.splits.items())
    )
    if tokens := curve.settings.get("patch_tokens"):
        lines.append(f"patches on {tokens:,} tokens at most")
    elif curve.settings.get("patch"):
        lines.append("quick patches: one matrix a block")
    return "\n".join(lines)


def _table(title: str) -> Table:
    return Table(
        title=Text(f"\n{title}"), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        show_edge=False, min_width=len(title), padding=(0, 1), caption_justify="left",
        collapse_padding=True,
    )  # fmt: skip


def _cuts(curve: Curve, state: State) -> list[CurvePoint]:
    return [point for point in curve.points if point.n and point.state == state]


def _by_size(points: Sequence[CurvePoint], table: Table) -> Iterator[CurvePoint]:
    """The points, with a line after those of one size."""
    for place, point in enumerate(points):
        yield point
        if place + 1 < len(points) and points[place + 1].n != point.n:
            table.add_section()


def _losses(curve: Curve, state: State) -> Table:
    """The losses of all cuts in one state."""
    points = _cuts(curve, state)
    table = _table(f"layers less, {_OF_STATE[state]}: nats a token")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("strategy", overflow="fold")
    table.add_column("drop", max_width=20)
    table.add_column("loss ± error", no_wrap=True)
    table.add_column("of\nln V", no_wrap=True)
    table.add_column("more ± error", no_wrap=True)
    table.add_column("", no_wrap=True)
    for point in _by_size(points, table):
        loss, lost = point.loss, curve.lost(point)
        digits = 3 if loss is None or loss.nats < 9.9995 else 2
        table.add_row(
            str(point.n), Text(point.strategy), ranges(point.dropped) or "–",
            "–" if loss is None else with_error(loss.nats, loss.stderr, digits),
            "–" if loss is None else f"{loss.normalized:.2f}",
            "–" if lost is None else _signed(lost, digits),
            _verdict(curve, point, curve.best(point.n, state), curve.behind(point)),
        )  # fmt: skip
    table.caption = _caption(curve, points)
    return table


def _scores(curve: Curve, task: str, state: State) -> Table:
    """The scores of all cuts in one state on one task."""
    whole = curve.whole.task(task)
    assert whole is not None
    chance = "" if whole.chance is None else f"; chance {100 * whole.chance:.1f}"
    table = _table(
        f"{task}, {_OF_STATE[state]}: {whole.metric} in %, whole model {_percent(whole)}"
    )
    table.caption = f"{len(whole.items)} items with {whole.num_shots} solved examples{chance}"
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("strategy", overflow="fold")
    table.add_column("drop", max_width=20)
    table.add_column("score ± error", no_wrap=True)
    table.add_column("difference", no_wrap=True)
    table.add_column("")
    points = _cuts(curve, state)
    for point in _by_size(points, table):
        scores, less = point.task(task), _less(curve, point, task)
        said = []
        if scores is not None and scores.at_chance:
            said.append("at chance")
        if less is not None and less.tied:
            said.append("tie with the whole")
        table.add_row(
            str(point.n), Text(point.strategy), ranges(point.dropped) or "–",
            "–" if scores is None else _percent(scores),
            "–" if less is None else _signed(_in_percent(less), 1), ", ".join(said),
        )  # fmt: skip
    return table


def _less(curve: Curve, point: CurvePoint, task: str) -> Difference | None:
    """The paired difference of a point to the whole model on a task."""
    scores, whole = point.task(task), curve.whole.task(task)
    return None if scores is None or whole is None else scores.minus(whole)


def _in_percent(found: Difference) -> Difference:
    return Difference(100 * found.mean, 100 * found.stderr, found.num_items)


def _percent(scores: TaskScores) -> str:
    return with_error(100 * scores.mean, 100 * scores.stderr, 1)


def _signed(found: Difference, digits: int) -> str:
    return ("+" if found.mean > 0 else "") + with_error(found.mean, found.stderr, digits)


def _verdict(
    curve: Curve, point: CurvePoint, best: CurvePoint | None, behind: Difference | None
) -> str:
    """Whether a cut is the best of its size and state, or cannot be told from it."""
    if best is None or behind is None or len(curve.strategies) < 2:
        return ""
    return "best" if point.dropped == best.dropped else "tie" if behind.tied else ""


def _caption(curve: Curve, points: Sequence[CurvePoint]) -> str:
    lines = ["more: than the whole model, paired by text"]
    if len(curve.strategies) > 1:
        lines.append(f"tie: with the best of its size, within {TIE:g} standard errors")
    as_whole = [
        f"{point.strategy} {point.n}"
        for point in points
        if (lost := curve.lost(point)) is not None and lost.tied
    ]
    if as_whole:
        lines.append(f"ties with the whole model: {', '.join(as_whole)}")
    return "\n".join(lines)


def _failures(points: Sequence[CurvePoint]) -> Table:
    table = _table("what could not be measured")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("strategy", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("why", overflow="fold")
    for point in points:
        table.add_row(str(point.n), Text(point.strategy), point.state, Text(point.failed or ""))
    return table
