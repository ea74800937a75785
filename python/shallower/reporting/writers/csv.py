"""Results as CSV, a line each, with all digits; what could not be measured is an empty cell."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...results.comparison import COLUMNS, ComparedModel, CriteriaComparison, Row
from ...results.scores import Estimate, Scores
from ...results.speech import MEASURES
from ...results.task_scores import TaskScores
from ...storage import write_file
from ...values.schema import finite


def write_comparison(comparison: CriteriaComparison, path: str | Path) -> None:
    """Write the whole models and the rows of a comparison, as they are in its JSON.

    Behind their columns are four for every task, and two for every measure of speech, as
    ``speech_acceptance``.
    """
    models = {model.name: model for model in comparison.models}
    named = dict.fromkeys(scores.task for model in models.values() for scores in model.tasks)
    spoken = MEASURES if any(model.speech is not None for model in models.values()) else ()
    rows = [_whole(model, named, spoken) for model in models.values()]
    rows += [_row(row, models[row.model], named, spoken) for row in comparison.rows]
    _write(path, list(rows[0]) if rows else list(COLUMNS), (row.values() for row in rows))


def _whole(model: ComparedModel, tasks: Iterable[str], spoken: Iterable[str]) -> dict[str, Any]:
    of: dict[str, Any] = {"model": model.name, "criterion": "whole", "n": 0, "state": "cut"}
    loss = model.whole and {"loss": model.whole.nats, "stderr": finite(model.whole.stderr)}
    of |= {"layers_share": 0.0, **(loss or {})}
    return {**dict.fromkeys(COLUMNS), **of, **_measures(model, model, tasks, spoken)}


def _row(
    row: Row, whole: ComparedModel, tasks: Iterable[str], spoken: Iterable[str]
) -> dict[str, Any]:
    columns = {name: value for name, value in row.to_json().items() if name in COLUMNS}
    return {**columns, "dropped": _indices(row.dropped), **_measures(row, whole, tasks, spoken)}


def _measures(
    found: Row | ComparedModel, whole: ComparedModel, tasks: Iterable[str], spoken: Iterable[str]
) -> dict[str, Any]:
    """The cells of the tasks and of the speech of a row."""
    cells: dict[str, Any] = {}
    for name in tasks:
        scores, beside = found.task(name), whole.task(name)
        less = None if scores is None or beside is None else scores.minus(beside)
        cells |= {**_estimate(name, scores), **_estimate(f"{name}_difference", less)}
    for name in spoken:
        means = None if found.speech is None else found.speech.of(name)
        cells |= _estimate(f"speech_{name}", means)
    return cells


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


def _estimate(name: str, found: Estimate | Scores | TaskScores | None) -> dict[str, float | None]:
    """The cells of a figure and its standard error."""
    mean, stderr = (None, None) if found is None else (found.mean, found.stderr)
    return {name: finite(mean), f"{name}_stderr": finite(stderr)}
