"""Results as CSV, a line each, with all digits; what could not be measured is an empty cell."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...storage import write_file
from ...values.comparison import COLUMNS, CriteriaComparison
from ...values.curve import Curve, CurvePoint
from ...values.schema import finite
from ...values.scores import Estimate, Scores
from ...values.speech import MEASURES
from ...values.task_scores import TaskScores


def write_comparison(comparison: CriteriaComparison, path: str | Path) -> None:
    """Write the rows of a comparison, as they are in its JSON."""
    rows = ({**row.to_json(), "dropped": _indices(row.dropped)} for row in comparison.rows)
    _write(path, list(COLUMNS), (row.values() for row in rows))


def write_curve(curve: Curve, path: str | Path) -> None:
    """Write the points of a curve; behind the losses are four columns for every task, and two for
    every measure of speech, as ``speech_acceptance``.
    """
    rows = [_curve_row(curve, point) for point in curve.points]
    _write(path, list(rows[0]), (row.values() for row in rows))


def _write(path: str | Path, names: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow(str(cell).lower() if isinstance(cell, bool) else cell for cell in row)
    write_file(Path(path), text.getvalue().encode())


def _indices(layers: Sequence[int]) -> str:
    """All indices in one cell."""
    return " ".join(map(str, layers))


def _curve_row(curve: Curve, point: CurvePoint) -> dict[str, Any]:
    loss, lost = point.loss, curve.lost(point)
    found = {
        "n": point.n,
        "strategy": point.strategy,
        "state": point.state,
        "dropped": _indices(point.dropped),
        "layers_share": point.layers_share,
        "parameters_share": point.parameters_share if point.dropped or not point.n else None,
        "time_share": point.time_share,
        "loss": loss and loss.nats,
        "stderr": loss and loss.stderr,
        "of_ln_vocabulary": loss and loss.normalized,
        **_estimate("lost", lost),
        "seconds": point.seconds,
        "failed": point.failed,
    }
    for name in curve.tasks:
        scores, whole = point.task(name), curve.whole.task(name)
        less = None if scores is None or whole is None else scores.minus(whole)
        found |= {**_estimate(name, scores), **_estimate(f"{name}_difference", less)}
    for name in MEASURES if curve.whole.speech is not None else ():
        means = None if point.speech is None else point.speech.of(name)
        found |= _estimate(f"speech_{name}", means)
    return found


def _estimate(name: str, found: Estimate | Scores | TaskScores | None) -> dict[str, float | None]:
    """The cells of a figure and its standard error."""
    mean, stderr = (None, None) if found is None else (found.mean, found.stderr)
    return {name: finite(mean), f"{name}_stderr": finite(stderr)}
