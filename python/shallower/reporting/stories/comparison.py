"""The story of a comparison of criteria: who loses least, what that costs, and which are ties."""

import math
from collections.abc import Sequence

from ...values.comparison import ComparedModel, CriteriaComparison, Row
from ...values.files import COMPARISON_FILE
from ...values.layers import ranges
from ..charts.comparison import Group, group_charts, groups_of
from ..page.story import Fact, Number, Section, Step, Story, Strip, Table
from .parts import (
    again,
    differs,
    few_texts,
    layer_words,
    loss_fact,
    made_by,
    range_cell,
    small_model,
    splits_words,
)


def comparison_story(
    comparison: CriteriaComparison, *, command: str = "", drawn: bool = True
) -> Story:
    """Tell a comparison of criteria.

    Args:
        comparison: of one model at least.
        command: the words on the command line that asked for it.
        drawn: draw figures; False where there is no matplotlib.

    Returns:
        The story.
    """
    groups = groups_of(comparison)
    first = groups[0] if groups else None
    return Story(
        "comparison", _title(comparison), _sentence(comparison, first),
        strips=_strips(groups), steps=() if first is None else _steps(first),
        cost="" if first is None else _cost(first),
        savings=() if first is None else _savings(first), warnings=tuple(_warnings(comparison)),
        sections=(
            _asked(comparison),
            *(_group(group, place, comparison, drawn) for place, group in enumerate(groups)),
            _numbers(comparison), _again(command),
            differs(comparison.max_length, _dtypes(comparison), comparison.versions, own=(
                "Patches are quick ones, one matrix a block; a full patch or a healing brings "
                "back more.",
            )),
        ),
        data=comparison.to_json(),
    )  # fmt: skip


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
            f"{group.title} without {row.n} layers, by {row.criterion}", group.model.num_layers,
            row.dropped, layer_words(row.dropped),
        )
        for group in groups[:3]
        for row in _best(group)[-1:]
    )  # fmt: skip


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
    patched = "" if row.patched is None else (
        f" A quick patch brings it to {Number.of(row.patched, row.patched_stderr).text} nats."
    )  # fmt: skip
    return (
        f"The best cut of {row.n} layers has {ratio:.2f} times the perplexity of the whole model, "
        f"{100 * row.layers_share:.0f} % of its layers and {100 * row.parameters_share:.0f} % of "
        f"its parameters gone.{patched}"
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
        if model.accuracy is not None and model.chance is not None and (
            model.accuracy <= model.chance + 0.05
        ):  # fmt: skip
            found.append(
                f"{model.title} answers {100 * model.accuracy:.0f} % of the items, no better than "
                f"a guess: what criteria lose there says nothing"
            )
    return found


def _asked(comparison: CriteriaComparison) -> Section:
    place = COMPARISON_FILE
    facts = (
        Fact("models", ", ".join(model.title for model in comparison.models), f"{place}: models"),
        Fact("dtype", _dtypes(comparison) or "not known", f"{place}: models"),
        Fact("judge", f"{comparison.judge}, {comparison.unit}", f"{place}: judge"),
        Fact("texts", splits_words(comparison.splits), f"{place}: splits"),
        Fact("sizes", ", ".join(str(n) for n in sorted({row.n for row in comparison.rows})),
             f"{place}: rows"),
    )  # fmt: skip
    line = "Every loss is of texts that report, which no criterion has seen."
    return Section("What was asked", (line,), facts)


def _group(group: Group, place: int, comparison: CriteriaComparison, drawn: bool) -> Section:
    rows = sorted(
        group.rows, key=lambda row: (row.n, row.regret if math.isfinite(row.regret) else math.inf)
    )
    cells = tuple(
        (
            row.criterion, Number.count(row.n), range_cell(row.dropped),
            Number.of(row.loss, row.stderr),
            Number.of(row.patched, row.patched_stderr), Number.of(row.regret, row.regret_stderr),
            "tie" if row.tied and row.regret else "best" if row.regret == 0 else "",
            Number.of(row.tau, digits=2, sign=True), Number.count(row.layer_forwards),
            Number.of(row.seconds, digits=1),
        )
        for row in rows
    )  # fmt: skip
    head = ("criterion", "n", "drop", "loss", "patched", "regret", "", "τ", "layer-forwards", "s")
    note = (
        f"Loss and patched in nats a token; regret in {comparison.unit}, paired with the best of "
        f"its size; τ is Kendall's, of the criterion's order of single layers with their true "
        f"losses. Each criterion is charged what it costs by itself."
    )
    table = Table("Every choice", head, cells, note)
    drawings = group_charts(group, place, comparison.unit) if drawn else []
    return Section(f"{group.title}: criteria against true loss", tables=(table,),
                   drawings=tuple(drawings))  # fmt: skip


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


def _again(command: str) -> Section:
    known = command or (
        "shallower compare MODEL --texts TEXTS --eval-texts TEXTS --n SIZES --out COMPARISON"
    )
    return again("The comparison, and this page.", known, "shallower report COMPARISON")
