"""Tables and CSV of criteria that were compared."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from ..storage import write_file
from ..values.comparison import ComparedModel, CriteriaComparison, Row
from ..values.layers import blocks_of
from ..values.loss import with_error

MOST_NAME = 16
"""Characters of a criterion's name that are not broken."""


def criteria_tables(comparison: CriteriaComparison) -> list[Table]:
    """Tabulate a comparison, in 80 columns.

    Args:
        comparison: of criteria, on one model or several.

    Returns:
        For every model a table for each number of layers, its rows by regret, and one of
        Kendall's τ; at the end the criteria and models that failed, and why.
    """
    tables: list[Table] = []
    for model in comparison.models:
        rows = [row for row in comparison.rows if row.model == model.name]
        of_model = [
            _choices(comparison, [row for row in rows if row.n == n])
            for n in sorted({row.n for row in rows})
        ]
        if taus := _taus(rows):
            of_model.append(taus)
        if of_model:
            of_model[0].title = Text(f"\n{_about(comparison, model)}\n{of_model[0].title}")
        tables += of_model
    for title, reasons in (
        ("criteria that could not choose", comparison.skipped),
        ("models that could not be compared", comparison.failures),
    ):
        if reasons:
            tables.append(_reasons(title, reasons))
    return tables


def table_of_criteria(criteria: Sequence[Mapping[str, str]]) -> Table:
    """Tabulate criteria, with what they look at and what they cost.

    Args:
        criteria: of each its ``name``, ``summary`` and ``cost``.

    Returns:
        A table with a row for every criterion.
    """
    table = _table("criteria")
    table.add_column("criterion", no_wrap=True)
    table.add_column("what it goes by")
    table.add_column("what it costs")
    for one in criteria:
        table.add_row(*(Text(one[key]) for key in ("name", "summary", "cost")))
    return table


def write_csv(comparison: CriteriaComparison, path: str | Path) -> None:
    """Write the rows of a comparison as CSV, a line each, under the names of their fields.

    The indices of dropped layers stand in one cell, joined by spaces. What could not be measured
    is an empty cell; figures have all their digits.

    Args:
        comparison: of criteria.
        path: the file, replaced where there is one.

    Raises:
        OutputError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(one.name for one in fields(Row))
    for row in comparison.rows:
        values = row.to_json()
        cells = {**values, "dropped": " ".join(map(str, row.dropped))}
        writer.writerow(
            str(value).lower() if isinstance(value, bool) else value for value in cells.values()
        )
    write_file(Path(path), text.getvalue().encode())


def _table(title: str) -> Table:
    """A table with narrow gaps, so that all columns have room."""
    return Table(
        title=Text(f"\n{title}"), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        show_edge=False, min_width=len(title), padding=0, caption_justify="left",
        collapse_padding=True,
    )  # fmt: skip


def _about(comparison: CriteriaComparison, model: ComparedModel) -> str:
    """The model, its loss, and on which texts all was measured, as lines above its tables."""
    whole = model.whole
    lines = [
        f"{model.title}: {model.num_layers} layers, loss of the whole model {whole} nats a token",
        f"on {whole.num_tokens} tokens of {whole.num_texts} texts; V = {whole.vocab_size}",
    ]
    words = {"fit": "to fit", "choose": "to choose", "report": "to report"}
    splits = ", ".join(f"{n} {words.get(name, name)}" for name, n in comparison.splits.items())
    lines.append(f"judge: {comparison.judge}, {comparison.unit}" + (splits and f"; {splits}"))
    if model.accuracy is not None:
        chance = "" if model.chance is None else f"; chance {_percent(model.chance)}"
        lines.append(f"accuracy of the whole model {_percent(model.accuracy)}{chance}")
    return "\n".join(lines)


def _choices(comparison: CriteriaComparison, rows: Sequence[Row]) -> Table:
    """What the criteria drop of one model, ``n`` layers each."""
    shares = sorted({round(100 * row.parameters_share) for row in rows})
    share = "–".join(dict.fromkeys(str(value) for value in (shares[0], shares[-1])))
    table = _table(
        f"n = {rows[0].n}: {100 * rows[0].layers_share:.0f} % of the layers, {share} % of the "
        f"parameters"
    )
    several = len({row.texts for row in comparison.rows}) > 1
    by_loss = comparison.judge == "loss"
    by_options = any(row.accuracy is not None for row in rows)
    longest = max(len(word) for row in rows for word in (row.criterion, several * row.texts))
    table.add_column(
        "criterion,\ntexts" if several else "criterion", no_wrap=longest <= MOST_NAME,
        overflow="fold",
    )  # fmt: skip
    table.add_column("drop")
    if by_loss:
        table.add_column("loss ± error", no_wrap=True)
    else:
        table.add_column(
            "accu-\nracy" if by_options else "score ± error", no_wrap=True,
            justify="right" if by_options else "left",
        )  # fmt: skip
        table.add_column("loss", no_wrap=True, justify="right")
    table.add_column("quick\npatch", no_wrap=True, justify="right")
    table.add_column("regret ± error", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=3)
    table.add_column("layer-\nforwards", no_wrap=True, justify="right")
    if by_loss:
        table.add_column("time", no_wrap=True, justify="right")
    # A regret that is not known comes last.
    for row in sorted(rows, key=lambda row: (math.isnan(row.regret), row.regret)):
        name = Text(row.criterion)
        if several:
            name.append(f"\n{row.texts}", style="dim")
        judged = [_short(row.loss, row.stderr)]
        if not by_loss:
            score = _short(row.score, row.score_stderr)
            judged = [_percent(row.accuracy) if by_options else score, _short(row.loss)]
        table.add_row(
            name,
            Text(_named(row.dropped)),
            *judged,
            _short(row.patched),
            *_regret(row),
            _count(row.layer_forwards),
            *([_duration(row.seconds)] if by_loss else []),
        )
    return table


def _regret(row: Row) -> tuple[str, str]:
    """A regret, and the word that says whether it is one."""
    if row.regret == 0:
        return "0 (the best)", ""
    return _short(row.regret, row.regret_stderr), "tie" if row.tied else ""


def _taus(rows: Sequence[Row]) -> Table | None:
    """Kendall's τ by criterion, a column for each calibration text; None where there is none."""
    texts = list(dict.fromkeys(row.texts for row in rows))
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.tau is not None:
            found.setdefault(row.criterion, {})[row.texts] = row.tau
    if not found:
        return None
    what = "Kendall's τ of single layers' costs\nwith the losses without them"
    table = _table("the order of single layers" if len(texts) == 1 else what)
    table.add_column("criterion", overflow="fold")
    for name in texts:
        table.add_column(Text(name if len(texts) > 1 else what), overflow="fold")
    for criterion, taus in sorted(found.items(), key=lambda item: -max(item[1].values())):
        cells = [f"{taus[name]:+.2f}" if name in taus else "–" for name in texts]
        table.add_row(Text(criterion), *cells)
    return table


def _reasons(title: str, reasons: Mapping[str, str]) -> Table:
    table = _table(title)
    table.add_column("name", overflow="fold")
    table.add_column("why", overflow="fold")
    for name, why in reasons.items():
        table.add_row(Text(name), Text(why))
    return table


def _named(layers: Sequence[int]) -> str:
    """Layers as ``--drop`` takes them: ``3, 12:20``; it can be broken at spaces."""
    blocks = blocks_of(layers)
    return ", ".join(
        str(block.start) if len(block) == 1 else f"{block.start}:{block.stop}" for block in blocks
    )


def _short(value: float | None, stderr: float | None = None) -> str:
    """A value with its error, in 13 characters up to 99."""
    value = _known(value)
    return with_error(value, stderr, 3 if value is None or abs(value) < 9.9995 else 2)


def _signed(value: float, stderr: float | None) -> str:
    return ("+" if value > 0 else "") + _short(value, stderr)


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _last(value: float | None) -> float:
    """A key that sorts what is not known behind everything else."""
    known = _known(value)
    return math.inf if known is None else known


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _count(number: int) -> str:
    """``840``, ``12.3k``, ``4.56M``: three digits at least."""
    if number < 1000:
        return str(number)
    unit, size = next(
        (unit, size) for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9))
        if number < 999.5 * size or unit == "G"
    )  # fmt: skip
    return f"{number / size:.3g}{unit}" if number < 999.5e9 else f"{number / size:,.0f}{unit}"


def _duration(seconds: float) -> str:
    """``0.3 s``, ``47 s``, ``12 min``, ``3.4 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
