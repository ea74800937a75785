"""The story of a comparison of criteria: who loses least, what that costs, and which are ties."""

import math
from collections.abc import Mapping, Sequence

from ...values.commands import command_line
from ...values.comparison import ComparedModel, CriteriaComparison, Row
from ...values.estimates import splits_words
from ...values.files import COMPARISON_FILE
from ...values.layers import layer_count, ranges
from ...values.scores import Estimate, Standing
from ..charts.comparison import DIVERGENCES, Group, group_charts, groups_of
from ..story import Cell, Fact, Number, Section, Step, Story, Strip, Table
from ..words import (
    BEST_OF_SEVERAL,
    again,
    compared,
    differs,
    few_texts,
    judge_words,
    layer_words,
    loss_fact,
    made_by,
    out_of,
    range_cell,
    small_model,
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
            *(_group(group, place, comparison, drawn) for place, group in enumerate(groups)),
            _settings(comparison),
            _numbers(comparison),
            _again(command, folder),
            differs(
                comparison.max_length,
                _dtypes(comparison),
                comparison.versions,
                own=(_own(groups),),
            ),
        ),
        data=comparison.to_json(),
    )


def _own(groups: Sequence[Group]) -> str:
    if groups and groups[0].model.num_experts is not None:
        return "Nothing is patched or healed behind experts that go; a healing brings back more."
    return "Patches are quick ones, one matrix a block; a full patch or a healing brings back more."


def _dtypes(comparison: CriteriaComparison) -> str | None:
    return ", ".join(dict.fromkeys(one.dtype for one in comparison.models if one.dtype)) or None


def _title(comparison: CriteriaComparison) -> str:
    criteria = len({row.criterion for row in comparison.rows})
    return f"{criteria} criteria on {', '.join(model.title for model in comparison.models)}"


def _best(group: Group) -> list[tuple[Row, Standing]]:
    """The best choice of each size."""
    sizes = sorted({row.n for row in group.rows})
    return [ranked[0] for n in sizes if (ranked := group.ranked(n))]


def _sentence(comparison: CriteriaComparison, group: Group | None) -> str:
    """Say whose cut is the best in the state by which cuts are ranked, and who in the other."""
    ranked = [] if group is None else group.ranked(max(row.n for row in group.rows))
    if group is None or not ranked:
        return "No criterion could be compared."
    (best, standing), total = ranked[0], group.model.num_layers
    goes = best.dropped, best.experts
    same = [row.criterion for row, _ in ranked[1:] if (row.dropped, row.experts) == goes]
    tied = [row.criterion for row, one in ranked[1:] if one.tied and row.criterion not in same]
    leads = _leads(comparison, [best.criterion, *same])
    when = group.when if group.by_patch or same else "as a bare cut"
    experts = group.model.num_experts
    gone = f"With {best.n} of {total} layers gone"
    if experts is not None:
        cuts = dict.fromkeys(_gone(row, experts) for row in group.rows if row.n == best.n)
        gone = f"With {' or '.join(cuts)} gone"
    without = f"without layers {ranges(best.dropped)} " if best.dropped else ""
    text = (
        f"{gone}, {leads} {when}: {without}the loss is {compared(standing.difference)} than whole"
    )
    if tied:
        leader = "it" if standing.regret.mean == 0 else "the best of all calibration texts"
        text += f"; {_listed(tied)} cannot be told from {leader}"
    worst, last = ranked[-1]
    if last.regret.mean > 0 and not last.tied:
        text += (
            f"; {worst.criterion} comes last, {compared(last.regret, f' {group.unit}', 'behind')}"
        )
    if experts is not None:
        return f"{text}."
    bare = [row.criterion for row in group.rows if row.n == best.n and row.unpatched]
    if group.by_patch and bare:
        text += f"; the {'cuts' if len(bare) > 1 else 'cut'} of {_listed(bare)} cannot be patched"
    return f"{text}. {_in_the_other_state(group, best)}".strip()


def _leads(comparison: CriteriaComparison, names: Sequence[str]) -> str:
    """``angular and cosine lose least``; of a judge but the loss, that they are best by it."""
    several, judge = len(names) > 1, comparison.judge
    if judge == "loss":
        return f"{_listed(names)} {'lose' if several else 'loses'} least"
    if judge == "speech":
        end = "least from the whole model on its own words"
        return f"{_listed(names)} {'diverge' if several else 'diverges'} {end}"
    return f"{_listed(names)} {'are' if several else 'is'} best by {judge}"


def _in_the_other_state(group: Group, best: Row) -> str:
    """Say whether the order of the largest size is another one as bare cuts, or after the patch.

    ``best`` is the first in the state by which cuts are ranked.
    """
    others = group.ranked(best.n, by_patch=not group.by_patch)
    where = "As bare cuts" if group.by_patch else "After a quick patch"
    if not others:
        return "No row says how they compare after a patch."
    leader, standing = others[0]
    if leader.dropped == best.dropped:
        here = [row.criterion for row, _ in group.ranked(best.n)]
        there = [row.criterion for row, _ in others]
        rest = "" if here == there else ", and others come in another order"
        tied = [row.criterion for row, one in others if one.tied and row.dropped != best.dropped]
        near = f"; {_listed(tied)} cannot be told from them" if tied else ""
        return f"{where} the same layers cost least{rest}{near}."
    own = next((one for row, one in others if row.criterion == best.criterion), None)
    text = f"{where} the order is another one: {leader.criterion} loses least, "
    text += f"{compared(standing.difference, unit='')} than whole"
    if own is None:
        return f"{text}, and {best.criterion} could not be patched."
    tie = ", a tie" if own.tied else ""
    return f"{text}, and {best.criterion} is {compared(own.regret, more='behind')}{tie}."


def _experts(n: int, number: int) -> str:
    return f"{n} of {number} experts of every layer"


def _gone(row: Row, number: int) -> str:
    """Say what a cut beside others of experts is without, and its share of the parameters."""
    what = _experts(row.n, number) if row.experts else layer_count(len(row.dropped))
    return f"{what} ({Number.share(row.parameters_share, 1).text} of the parameters)"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _strips(groups: Sequence[Group]) -> tuple[Strip, ...]:
    return tuple(
        Strip(
            f"{group.title} without {layer_count(len(row.dropped))}, by {row.criterion}",
            group.model.num_layers,
            row.dropped,
            layer_words(row.dropped),
        )
        for group in groups[:3]
        for row, _ in _best(group)[-1:]
        if row.dropped
    )


def _steps(group: Group) -> tuple[Step, ...]:
    best, whole = _best(group), group.model.whole
    most = max([0.0, *(one.difference.mean for _, one in best)]) or 1.0
    steps = [Step("whole", Number.of(whole.nats, whole.stderr))]
    for row, one in best:
        more = Number.estimate(one.difference, sign=True).text
        share = max(0.0, one.difference.mean / most)
        name = f"n = {row.n}{', patched' if group.by_patch else ''}"
        steps.append(Step(name, Number.estimate(one.loss), more, share, row is best[-1][0]))
    return tuple(steps)


def _cost(group: Group) -> str:
    best = _best(group)
    if not best:
        return ""
    row, one = best[-1]
    ratio = math.exp(min(700.0, one.difference.mean))
    other = ""
    experts = group.model.num_experts
    if experts is not None:
        return (
            f"The best cut, of {_gone(row, experts)}, has {ratio:.2f} times the perplexity of the "
            f"whole model as a bare cut."
        )
    if group.by_patch:
        other = f" As a bare cut its loss is {Number.estimate(row.cut.loss).text} nats a token."
    elif row.patched is not None:
        loss = Number.estimate(row.patched.loss).text
        other = f" A quick patch brings it to {loss} nats a token."
    return (
        f"The best cut of {layer_count(row.n)} has {ratio:.2f} times the perplexity of the whole "
        f"model {'after a quick patch' if group.by_patch else 'as a bare cut'}, "
        f"{100 * row.layers_share:.0f} % of its layers and "
        f"{100 * row.parameters_share:.0f} % of its parameters gone.{other}"
    )


def _savings(group: Group) -> tuple[Fact, ...]:
    return tuple(
        Fact(name, Number.share(share), f"{COMPARISON_FILE}: rows, {row.criterion}, n = {row.n}")
        for row, _ in _best(group)[-1:]
        for name, share in (("layers", row.layers_share), ("parameters", row.parameters_share))
        if share
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
        Fact("judge", judge_words(comparison.judge, comparison.unit), f"{place}: judge"),
        Fact("texts", splits_words(comparison.splits), f"{place}: splits"),
        Fact(
            "sizes",
            ", ".join(str(n) for n in sorted({row.n for row in comparison.rows})),
            f"{place}: rows",
        ),
    )
    line = "Every loss is of the test set, which no criterion has seen."
    return Section("Settings", (line,), facts)


def _group(group: Group, place: int, comparison: CriteriaComparison, drawn: bool) -> Section:
    model = group.model
    experts = f", {model.num_experts} experts a router" if model.num_experts else ""
    lines = [
        f"{whole_words(model.whole)} It has {model.num_layers} layers{experts}.",
        f"Judge: {judge_words(comparison.judge, comparison.unit)}; texts: "
        f"{splits_words(comparison.splits)}.",
    ]
    if model.accuracy is not None:
        chance = "" if model.chance is None else f"; chance {Number.share(model.chance, 1).text}"
        right = Number.share(model.accuracy, 1).text
        lines.append(f"Accuracy of the whole model {right}{chance}.")
    sizes = sorted({row.n for row in group.rows})
    make = _choices if model.num_experts is None else _expert_choices
    tables = [make(comparison, group, n) for n in sizes]
    drawings = group_charts(group, place) if drawn else []
    return Section(
        f"{group.title}: criteria against true loss",
        tuple(lines),
        tables=(*tables, *_spoken(group), *_taus(group)),
        drawings=tuple(drawings),
    )


def _choices(comparison: CriteriaComparison, group: Group, n: int) -> Table:
    """Tabulate what the criteria drop of one model by regret, those without one last."""
    ranked = [row for row, _ in group.ranked(n)]
    others = [row for row in group.rows if row.n == n and group.standing(row) is None]
    rows = [*ranked, *sorted(others, key=lambda row: (not row.cut.is_ranked, row.cut.regret.mean))]
    shares = sorted({round(100 * row.parameters_share) for row in rows})
    share = "–".join(dict.fromkeys(str(value) for value in (shares[0], shares[-1])))
    judged = _judged(comparison, rows)
    cut, patched = ("cut", "") if group.by_patch else ("", "patched")
    head = ["criterion", "drop", "loss", "regret", cut, "patch", "patch regret", patched,
            "layer forwards", "time"]  # fmt: skip
    if judged:
        diverges = judged == "score" and comparison.judge in DIVERGENCES
        head.insert(3, "divergence" if diverges else judged)
    state = "after the quick patch" if group.by_patch else "bare cuts"
    return Table(
        f"n = {n}: {100 * rows[0].layers_share:.0f} % of the layers, {share} % of the parameters",
        tuple(head),
        tuple(_cells(row, judged, *_patched_cells(row.patched)) for row in rows),
        f"Loss, as cut and after a quick patch, in nats a token; regret in {group.unit}, "
        f"of patched cuts in nats a token, each paired with the best of its kind. Order, best and "
        f"tie: {state}. {BEST_OF_SEVERAL} Each criterion is charged what it costs by itself.",
        bare=("patch", *(["loss", "regret"] if group.by_patch else ["loss"] if judged else [])),
        wide=("cut",)
        if group.by_patch
        else ("patched", "patch regret", *(["time"] if judged else [])),
    )


def _expert_choices(comparison: CriteriaComparison, group: Group, n: int) -> Table:
    """Tabulate which experts the criteria drop of one model, by regret as bare cuts."""
    judged = _judged(comparison, group.rows)
    head = ["criterion", "drop", "loss", "regret", "", "parameters", "layer forwards", "time"]
    if judged:
        head.insert(3, judged)
    return Table(
        f"n = {n}: {_experts(n, group.model.num_experts or 0)}",
        tuple(head),
        tuple(
            _cells(row, judged, Number.share(row.parameters_share, 1)) for row, _ in group.ranked(n)
        ),
        f"Loss in nats a token, regret in {group.unit}, paired with the best; parameters that go "
        f"as a share of all. layers: of the blocks of least angular distance the one whose share "
        f"is nearest; exhaustive: the best of all sets by the judge on the selection set.",
    )


def _judged(comparison: CriteriaComparison, rows: Sequence[Row]) -> str:
    """What a table shows of the judge beside the loss; empty where that is the judge."""
    if any(row.accuracy is not None for row in rows):
        return "accuracy"
    return "" if comparison.judge == "loss" else "score"


def _cells(row: Row, judged: str, *beside: Cell) -> tuple[Cell, ...]:
    """The cells of a choice: what goes, what the bare cut loses, what is beside that, the cost."""
    by_judge = {"score": [_narrow(row.score)], "accuracy": [Number.share(row.accuracy, 1)]}
    return (
        row.criterion,
        _dropped(row),
        _narrow(row.cut.loss),
        *by_judge.get(judged, []),
        _narrow(row.cut.regret),
        _verdict(row.cut),
        *beside,
        Number(_count(row.layer_forwards), row.layer_forwards),
        Number(_duration(row.seconds), row.seconds),
    )


MOST_NAMED = 24
"""Characters of the experts that a table names; all are in the JSON and the CSV."""


def _dropped(row: Row) -> Cell:
    if row.experts is None:
        return range_cell(row.dropped)
    fits = len(row.experts) <= MOST_NAMED
    return row.experts if fits else f"{row.experts[:MOST_NAMED]}…"


def _spoken(group: Group) -> list[Table]:
    """Tabulate how the bare cuts speak, those that would be accepted most first."""
    known = [row for row in group.rows if row.acceptance is not None]
    known.sort(key=lambda row: (row.n, -row.acceptance.mean if row.acceptance else 0.0))
    rows = tuple(
        (
            Number.count(row.n),
            row.criterion,
            range_cell(row.dropped),
            Number.estimate(row.acceptance, 1, scale=100),
            Number.estimate(row.repetition, 1, scale=100),
        )
        for row in known
    )
    head = ("n", "criterion", "drop", "acceptance, %", "repeated, %")
    note = (
        "Acceptance: of the whole model's own words, by speculative decoding; repeated: of the "
        "4-grams of the cut's own. Bare cuts; errors are over prompts."
    )
    return [Table("How the cuts speak", head, rows, note, is_grouped=True)] if rows else []


def _patched_cells(patched: Standing | None) -> tuple[Cell, ...]:
    loss, regret = (None, None) if patched is None else (patched.loss, patched.regret)
    return _narrow(loss), _narrow(regret), _verdict(patched)


def _verdict(standing: Standing | None) -> str:
    if standing is None:
        return ""
    return "best" if standing.regret.mean == 0 else "tie" if standing.tied else ""


def _narrow(found: Estimate | None) -> Number:
    """Write a figure with its error in 13 characters up to 99."""
    return Number.estimate(found, 3 if found is None or abs(found.mean) < 9.9995 else 2)


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
    return [Table("The order of single layers", ("criterion", "τ"), rows, note)]


def criteria_table(criteria: Sequence[Mapping[str, str]]) -> Table:
    """Tabulate criteria, each with its ``name``, ``summary`` and ``cost``."""
    rows = tuple((one["name"], one["summary"], one["cost"]) for one in criteria)
    return Table("Criteria", ("criterion", "what it goes by", "what it costs"), rows)


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
    return again(
        "The comparison, and this page.", known, command_line("report", out_of(command, folder))
    )
