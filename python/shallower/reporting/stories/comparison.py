"""The story of a comparison of criteria: who loses least, what that costs, and which are ties."""

import math
from collections.abc import Mapping, Sequence

from ...values.comparison import ComparedModel, CriteriaComparison, Row
from ...values.files import COMPARISON_FILE
from ...values.layers import layer_count, ranges
from ..charts.comparison import Group, group_charts, groups_of
from ..story import Cell, Fact, Number, Section, Step, Story, Strip, Table
from ..words import (
    again,
    differs,
    few_texts,
    layer_words,
    loss_fact,
    made_by,
    range_cell,
    small_model,
    splits_words,
    whole_words,
)


def comparison_story(
    comparison: CriteriaComparison,
    *,
    command: str = "",
    folder: str = "COMPARISON",
    drawn: bool = True,
) -> Story:
    """Make the story of a comparison; ``command`` is its command line, ``drawn`` with figures."""
    groups = groups_of(comparison)
    first = groups[0] if groups else None
    return Story(
        "comparison",
        _title(comparison),
        _sentence(comparison, first),
        strips=_strips(groups),
        steps=() if first is None else _steps(first),
        cost="" if first is None else _cost(first),
        savings=() if first is None else _savings(first),
        warnings=tuple(_warnings(comparison)),
        sections=(
            _settings(comparison),
            *(_group(group, place, comparison, drawn) for place, group in enumerate(groups)),
            _numbers(comparison),
            _again(command, folder),
            differs(
                comparison.max_length,
                _dtypes(comparison),
                comparison.versions,
                own=(
                    "Patches are quick ones, one matrix a block; a full patch or a healing brings "
                    "back more.",
                ),
            ),
        ),
        data=comparison.to_json(),
    )


def _dtypes(comparison: CriteriaComparison) -> str | None:
    return ", ".join(dict.fromkeys(one.dtype for one in comparison.models if one.dtype)) or None


def _title(comparison: CriteriaComparison) -> str:
    criteria = len({row.criterion for row in comparison.rows})
    return f"{criteria} criteria on {', '.join(model.title for model in comparison.models)}"


def _largest(group: Group) -> list[Row]:
    """The rows of the largest size, of least regret first; what is not known is left out."""
    most = max(row.n for row in group.rows)
    rows = [row for row in group.rows if row.n == most and math.isfinite(row.regret)]
    return sorted(rows, key=lambda row: row.regret)


def _best(group: Group) -> list[Row]:
    """The best choice of each size."""
    found: dict[int, Row] = {}
    for row in group.rows:
        if math.isfinite(row.regret) and (row.n not in found or row.regret < found[row.n].regret):
            found[row.n] = row
    return [found[n] for n in sorted(found)]


def _sentence(comparison: CriteriaComparison, group: Group | None) -> str:
    rows = [] if group is None else _largest(group)
    if group is None or not rows:
        return "No criterion could be compared."
    best, total = rows[0], group.model.num_layers
    tied = [row.criterion for row in rows[1:] if row.tied]
    same = [row.criterion for row in rows[1:] if row.dropped == best.dropped]
    others = [name for name in tied if name not in same]
    text = (
        f"With {best.n} of {total} layers gone, {_listed([best.criterion, *same])} "
        f"{'lose' if same else 'loses'} least: without layers {ranges(best.dropped)} the model "
        f"loses {Number.of(best.difference, best.difference_stderr, 2).text} nats a "
        f"token before a patch"
    )
    if others:
        text += f"; {_listed(others)} cannot be told from it"
    worst = rows[-1]
    if worst.regret > 0 and not worst.tied:
        regret = Number.of(worst.regret, worst.regret_stderr, 2).text
        text += f"; {worst.criterion} comes last, {regret} {comparison.unit} behind"
    return f"{text}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _strips(groups: Sequence[Group]) -> tuple[Strip, ...]:
    return tuple(
        Strip(
            f"{group.title} without {layer_count(row.n)}, by {row.criterion}",
            group.model.num_layers,
            row.dropped,
            layer_words(row.dropped),
        )
        for group in groups[:3]
        for row in _best(group)[-1:]
    )


def _steps(group: Group) -> tuple[Step, ...]:
    rows, whole = _best(group), group.model.whole
    most = max([row.difference for row in rows] or [1.0]) or 1.0
    steps = [Step("whole", Number.of(whole.nats, whole.stderr))]
    for row in rows:
        more = Number.of(row.difference, row.difference_stderr, sign=True).text
        share = min(1.0, max(0.0, row.difference / most))
        loss = Number.of(row.loss, row.stderr)
        steps.append(Step(f"n = {row.n}", loss, more, share, row is rows[-1]))
    return tuple(steps)


def _cost(group: Group) -> str:
    rows = _best(group)
    if not rows:
        return ""
    row = rows[-1]
    ratio = math.exp(min(700.0, row.difference))
    patched = (
        ""
        if row.patched is None
        else (
            f" A quick patch brings it to {Number.of(row.patched, row.patched_stderr).text} nats."
        )
    )
    return (
        f"The best cut of {layer_count(row.n)} has {ratio:.2f} times the perplexity of the whole "
        f"model, {100 * row.layers_share:.0f} % of its layers and "
        f"{100 * row.parameters_share:.0f} % of its parameters gone.{patched}"
    )


def _savings(group: Group) -> tuple[Fact, ...]:
    return tuple(
        Fact(name, Number.share(share), f"{COMPARISON_FILE}: rows, {row.criterion}, n = {row.n}")
        for row in _best(group)[-1:]
        for name, share in (("layers", row.layers_share), ("parameters", row.parameters_share))
    )


def _warnings(comparison: CriteriaComparison) -> list[str]:
    found = [f"{name} could not be compared: {why}" for name, why in comparison.failures.items()]
    found += [f"{name} could not choose: {why}" for name, why in comparison.skipped.items()]
    for model in comparison.models:
        found += small_model(model.parameters)
    found += few_texts(min([model.whole.num_texts for model in comparison.models] or [0]))
    for model in comparison.models:
        if (
            model.accuracy is not None
            and model.chance is not None
            and (model.accuracy <= model.chance + 0.05)
        ):
            found.append(
                f"{model.title} answers {100 * model.accuracy:.0f} % of the items, no better than "
                f"a guess: what criteria lose there says nothing"
            )
    return found


def _settings(comparison: CriteriaComparison) -> Section:
    place = COMPARISON_FILE
    facts = (
        Fact("models", ", ".join(model.title for model in comparison.models), f"{place}: models"),
        Fact("dtype", _dtypes(comparison) or "not known", f"{place}: models"),
        Fact("judge", f"{comparison.judge}, {comparison.unit}", f"{place}: judge"),
        Fact("texts", splits_words(comparison.splits), f"{place}: splits"),
        Fact(
            "sizes",
            ", ".join(str(n) for n in sorted({row.n for row in comparison.rows})),
            f"{place}: rows",
        ),
    )
    line = "Every loss is of texts that report, which no criterion has seen."
    return Section("Settings", (line,), facts)


def _group(group: Group, place: int, comparison: CriteriaComparison, drawn: bool) -> Section:
    model = group.model
    lines = [
        f"{whole_words(model.whole)} It has {model.num_layers} layers.",
        f"Judge: {comparison.judge}, {comparison.unit}; texts: {splits_words(comparison.splits)}.",
    ]
    if model.accuracy is not None:
        chance = "" if model.chance is None else f"; chance {Number.share(model.chance, 1).text}"
        right = Number.share(model.accuracy, 1).text
        lines.append(f"Accuracy of the whole model {right}{chance}.")
    sizes = sorted({row.n for row in group.rows})
    tables = [_choices(comparison, [row for row in group.rows if row.n == n]) for n in sizes]
    drawings = group_charts(group, place, comparison.unit) if drawn else []
    return Section(
        f"{group.title}: criteria against true loss",
        tuple(lines),
        tables=(*tables, *_taus(group)),
        drawings=tuple(drawings),
    )


def _choices(comparison: CriteriaComparison, rows: Sequence[Row]) -> Table:
    """Tabulate what the criteria drop of one model, a number of layers each, by regret."""
    shares = sorted({round(100 * row.parameters_share) for row in rows})
    share = "–".join(dict.fromkeys(str(value) for value in (shares[0], shares[-1])))
    judged = "" if comparison.judge == "loss" else "score"
    if any(row.accuracy is not None for row in rows):
        judged = "accuracy"
    ordered = sorted(rows, key=lambda row: (math.isnan(row.regret), row.regret))
    head = ["criterion", "drop", "loss", "patch", "regret", "", "layer forwards", "time"]
    if judged:
        head.insert(3, judged)
    return Table(
        f"n = {rows[0].n}: {100 * rows[0].layers_share:.0f} % of the layers, {share} % of the "
        f"parameters",
        tuple(head),
        tuple(_choice(row, judged) for row in ordered),
        f"Loss, as cut and after a quick patch, in nats a token; regret in {comparison.unit}, "
        f"paired with the best. Each criterion is charged what it costs by itself.",
        bare=("patch", *(["loss"] if judged else [])),
        wide=("time",) if judged else (),
    )


def _choice(row: Row, judged: str) -> tuple[Cell, ...]:
    cells: list[Cell] = [row.criterion, range_cell(row.dropped), _narrow(row.loss, row.stderr)]
    if judged == "score":
        cells.append(_narrow(row.score, row.score_stderr))
    elif judged:
        cells.append(Number.share(row.accuracy, 1))
    cells += [
        _narrow(row.patched, row.patched_stderr),
        _narrow(row.regret, row.regret_stderr),
        "best" if row.regret == 0 else "tie" if row.tied else "",
        Number(_count(row.layer_forwards), row.layer_forwards),
        Number(_duration(row.seconds), row.seconds),
    ]
    return tuple(cells)


def _narrow(value: float | None, stderr: float | None) -> Number:
    """Write a value with its error in 13 characters up to 99."""
    return Number.of(value, stderr, 3 if value is None or abs(value) < 9.9995 else 2)


def _taus(group: Group) -> list[Table]:
    """Tabulate how well criteria order single layers; nothing where none does."""
    taus = {row.criterion: row.tau for row in group.rows if row.tau is not None}
    if not taus:
        return []
    rows = tuple(
        (name, Number.of(tau, digits=2, sign=True))
        for name, tau in sorted(taus.items(), key=lambda item: -item[1])
    )
    note = "Kendall's τ of the costs of single layers with the losses without them."
    return [Table("the order of single layers", ("criterion", "τ"), rows, note)]


def criteria_table(criteria: Sequence[Mapping[str, str]]) -> Table:
    """Tabulate criteria, each with its ``name``, ``summary`` and ``cost``."""
    rows = tuple((one["name"], one["summary"], one["cost"]) for one in criteria)
    return Table("criteria", ("criterion", "what it goes by", "what it costs"), rows)


def _count(number: int) -> str:
    """Write ``840``, ``12.3k``, ``4.56M``: three digits at least."""
    if number < 1000:
        return str(number)
    unit, size = next(
        (unit, size)
        for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9))
        if number < 999.5 * size or unit == "G"
    )
    return f"{number / size:.3g}{unit}" if number < 999.5e9 else f"{number / size:,.0f}{unit}"


def _duration(seconds: float) -> str:
    """Write ``0.3 s``, ``47 s``, ``12 min``, ``3.4 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _numbers(comparison: CriteriaComparison) -> Section:
    def facts(model: ComparedModel) -> list[Fact]:
        place = f"{COMPARISON_FILE}: models, {model.title}"
        found = [loss_fact(f"{model.title}, whole", model.whole, place)]
        if model.accuracy is not None:
            found.append(Fact(f"{model.title}, accuracy", Number.share(model.accuracy, 1), place))
        return found

    line = (
        f"All rows above are {COMPARISON_FILE}: rows, with all their digits, and comparison.csv; "
        f"± is one standard error, over texts."
    )
    found = [fact for model in comparison.models for fact in facts(model)]
    found += made_by(comparison.versions, f"{COMPARISON_FILE}: versions")
    return Section("Every number, and where it is from", (line,), tuple(found))


def _again(command: str, folder: str) -> Section:
    known = command or (
        "shallower compare MODEL --texts TEXTS --eval-texts TEXTS --n SIZES --out COMPARISON"
    )
    return again("The comparison, and this page.", known, f"shallower report {folder}")
