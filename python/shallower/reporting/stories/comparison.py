"""The story of a comparison of criteria: who loses least, what that costs, and which are ties."""

import math
from collections.abc import Mapping, Sequence

from ...results.comparison import ComparedModel, CriteriaComparison, Row
from ...results.scores import Standing
from ...scanning.scan import Scan
from ...settings.studies import State
from ...values.counts import counted
from ...values.estimates import splits_words
from ...values.files import COMPARISON_FILE
from ...values.layers import layer_count, ranges
from ...values.provenance import command_line
from ..charts.comparison import Group, group_charts, groups_of
from ..charts.models import titled_starts
from ..story import Fact, ModelState, Number, Section, Story, Strip
from ..words import (
    again,
    capital,
    compared,
    differs,
    few_texts,
    judge_words,
    layer_words,
    loss_fact,
    made_by,
    out_of,
    patch_words,
    patched_name,
    small_model,
    whole_words,
)
from .cuts import (
    failures_tables,
    losses_table,
    scores_table,
    speech_of_cuts,
    taus_tables,
    whole_of,
)
from .models import (
    bears_section,
    data_of_models,
    models_sentence,
    regrets_section,
    starts_section,
)


def comparison_story(
    comparison: CriteriaComparison,
    *,
    command: str = "",
    folder: str = "COMPARISON",
    drawn: bool = True,
    scans: Mapping[str, Scan] | None = None,
) -> Story:
    """Make the story of a comparison; ``command`` is its command line, ``drawn`` with figures.

    ``scans`` are those of its models and texts, by their titles.
    """
    groups = groups_of(comparison)
    first = groups[0] if len(groups) == 1 or (groups and not _of_layers(groups)) else None
    shown = None if first is None else _shown(first)
    return Story(
        "comparison",
        _title(comparison),
        _headline(comparison, groups, shown),
        strips=_strips(groups),
        steps=() if first is None else _steps(first, shown),
        cost="" if first is None else _cost(first, shown),
        savings=_savings(shown),
        warnings=tuple(_warnings(comparison)),
        sections=(
            *_several(comparison, groups, scans or {}, drawn),
            *(_group(group, place, comparison, drawn) for place, group in enumerate(groups)),
            _settings(comparison),
            _numbers(comparison),
            _again(command, folder),
            differs(
                comparison.max_length,
                _dtypes(comparison),
                comparison.versions,
                own=(_own(groups),) if groups else (),
            ),
        ),
        data={**comparison.to_json(), **(data_of_models(groups) if len(groups) > 1 else {})},
    )


def _several(
    comparison: CriteriaComparison,
    groups: Sequence[Group],
    scans: Mapping[str, Scan],
    drawn: bool,
) -> list[Section]:
    """Say how models and texts differ, where there are several, and where layers are alike."""
    found = [bears_section(groups, drawn)] if _of_layers(groups) and len(groups) > 1 else []
    if any(model.starts for model in comparison.models):
        sizes = comparison.settings.get("n", ())
        found.append(starts_section(comparison.models, sizes, scans=scans, drawn=drawn))
    if len(groups) > 1 and any(len(group.criteria) > 1 for group in groups):
        found.append(regrets_section(groups, drawn))
    return found


def _of_layers(groups: Sequence[Group]) -> bool:
    return all(group.model.num_experts is None for group in groups)


Shown = tuple[Row, Standing] | None
"""The cut that comes first, and how it stands."""


def _shown(group: Group) -> Shown:
    """The best cut at the knee, the size farthest below the line between the ends; or the least."""
    best = {row.n: (row, standing) for row, standing in group.best()}
    lost = {n: standing.difference.mean for n, (_, standing) in best.items()}
    end = max(lost, default=0)
    below = {n: lost[end] * n / end - lost[n] for n in lost if n < end}
    size = max(below, key=lambda n: (below[n], -n), default=end)
    return best.get(size if below.get(size, 0) > 0 else min(best, default=0))


def _own(groups: Sequence[Group]) -> str:
    if groups[0].model.num_experts is not None:
        return "Nothing is patched or healed behind experts that go; a healing brings back more."
    if "healed" in groups[0].states:
        return f"What is healed has a {patch_words(groups[0].settings)} first."
    if groups[0].settings.get("patch") == "full":
        return "A healing brings back more than a patch."
    return "Patches are quick ones, one matrix a block; a full patch or a healing brings back more."


def _dtypes(comparison: CriteriaComparison) -> str | None:
    return ", ".join(dict.fromkeys(one.dtype for one in comparison.models if one.dtype)) or None


def _title(comparison: CriteriaComparison) -> str:
    names = ", ".join([model.title for model in comparison.models] or comparison.failures)
    number = len(comparison.criteria)
    what = f"{counted(number, 'criterion', 'criteria')} on" if number else "The layers of"
    return f"{what} {names}"


def _headline(comparison: CriteriaComparison, groups: Sequence[Group], shown: Shown) -> str:
    """Say what several models bear, where the layers of a scan are alike, or who is the best."""
    if len(groups) > 1 and _of_layers(groups):
        return models_sentence(groups)
    if groups and shown is not None:
        return _sentence(comparison, groups[0], shown)
    if comparison.judge == "none" and comparison.models:
        return _alike(comparison)
    return "No criterion could be compared."


def _alike(comparison: CriteriaComparison) -> str:
    """Say where the block of the largest size starts in each model."""
    size = max(comparison.settings.get("n", (1,)))
    places = [
        f"{title} [{start.start}, {start.start + start.n})"
        for title, _, starts in titled_starts(comparison.models)
        for start in starts
        if start.n == size
    ]
    return f"The {layer_count(size)} whose ends are most alike: {'; '.join(places)}."


def _sentence(comparison: CriteriaComparison, group: Group, shown: tuple[Row, Standing]) -> str:
    """Say whose cut is the best in the state by which cuts are ranked, and who in the other."""
    parts = [_alone(group, *shown) if len(group.criteria) == 1 else _race(comparison, group, shown)]
    parts += [_holds(group, shown[0], task.task) for task in group.model.tasks]
    text = f"{'; '.join(parts)}."
    if len(group.criteria) == 1 or len(group.states) == 1 or group.model.num_experts is not None:
        return text
    return f"{text} {_in_the_other_state(group, shown[0])}".strip()


def _alone(group: Group, row: Row, standing: Standing) -> str:
    """Say what the cut of the one criterion loses."""
    when = group.words(row.state, one=True)
    return (
        f"Without layers {ranges(row.dropped)}, {Number.share(row.layers_share).text} of layers, "
        f"chosen by {row.criterion}, {when}, the loss is {compared(standing.difference)} "
        f"than whole ({whole_of(group).nats:.2f} → {standing.loss.mean:.2f})"
    )


def _race(comparison: CriteriaComparison, group: Group, shown: tuple[Row, Standing]) -> str:
    """Say which criterion is the best at a size, which are ties, and which comes last."""
    (best, standing), experts = shown, group.model.num_experts
    ranked = group.ranked(best.n)
    goes = best.dropped, best.experts
    same = [row.criterion for row, _ in ranked[1:] if (row.dropped, row.experts) == goes]
    tied = [row.criterion for row, one in ranked[1:] if one.tied and row.criterion not in same]
    leads = _leads(comparison, [best.criterion, *same])
    gone = f"With {best.n} of {group.model.num_layers} layers gone"
    if experts is not None:
        cuts = dict.fromkeys(_gone(row, experts) for row in group.rows if row.n == best.n)
        gone = f"With {' or '.join(cuts)} gone"
    without = f"without layers {ranges(best.dropped)} " if best.dropped else ""
    when = group.words(best.state, one=not same)
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
    here = [row for row in group.rows if (row.n, row.state) == (best.n, group.state)]
    failed = [row.criterion for row in here if row.failed]
    if group.state != "cut" and failed:
        which = "cuts" if len(failed) > 1 else "cut"
        text += f"; the {which} of {_listed(failed)} cannot be {group.state}"
    return text


def _holds(group: Group, shown: Row, task: str) -> str:
    """Say up to which cut a score is no worse than the whole model's, errors allowed."""
    whole, last = group.model.task(task), None
    for row in group.line(shown.criterion, shown.state):
        scores = row.task(task)
        if scores is None or whole is None:
            continue
        lost = scores.minus(whole)
        if lost.mean < 0 and not lost.tied:
            break
        last = row
    if last is None:
        return f"{task} falls with the first layers that go"
    return f"{task} holds up to {Number.share(last.layers_share).text} of layers"


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
    """Compare the order of a size, with its ``best`` first, with that of bare or patched cuts."""
    state: State = "patched" if group.state == "cut" else "cut"
    others, where = group.ranked(best.n, state), capital(group.words(state))
    if not others:
        return ""
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
        return f"{text}, and {best.criterion} has no such cut."
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
            f"{group.title} without {layer_count(len(shown[0].dropped))}, by {shown[0].criterion}",
            group.model.num_layers,
            shown[0].dropped,
            layer_words(shown[0].dropped),
        )
        for group in groups[:3]
        if (shown := _shown(group)) and shown[0].dropped
    )


def _steps(group: Group, shown: Shown) -> tuple[ModelState, ...]:
    """The whole model, and the cut that comes first in each of its states."""
    whole = whole_of(group)
    steps = [ModelState("whole", Number.of(whole.nats, whole.stderr))]
    if shown is None:
        return tuple(steps)
    rows = [row for row in group.rows if (row.criterion, row.n) == (shown[0].criterion, shown[0].n)]
    found = [(row, row.standing) for row in rows if row.standing is not None]
    most = max([0.0, *(one.difference.mean for _, one in found)]) or 1.0
    for row, one in found:
        more = Number.estimate(one.difference, sign=True).text
        name = patched_name(group.settings) if row.state == "patched" else row.state
        share = max(0.0, one.difference.mean / most)
        steps.append(ModelState(name, Number.estimate(one.loss), more, share, row is shown[0]))
    return tuple(steps)


def _cost(group: Group, shown: Shown) -> str:
    if shown is None:
        return ""
    row, one = shown
    ratio, experts = math.exp(min(700.0, one.difference.mean)), group.model.num_experts
    if experts is not None:
        return (
            f"The best cut, of {_gone(row, experts)}, has {ratio:.2f} times the perplexity of the "
            f"whole model as a bare cut."
        )
    other = ""
    for each in group.rows:
        is_same = (each.criterion, each.n) == (row.criterion, row.n) and each is not row
        if is_same and each.standing is not None:
            loss = Number.estimate(each.standing.loss).text
            when = capital(group.words(each.state, one=True))
            other += f" {when} its loss is {loss} nats a token."
    return (
        f"The best cut of {layer_count(row.n)} has {ratio:.2f} times the perplexity of the whole "
        f"model {group.words(row.state, one=True)}, {100 * row.layers_share:.0f} % of its layers "
        f"and {100 * row.parameters_share:.0f} % of its parameters gone.{other}"
    )


def _savings(shown: Shown) -> tuple[Fact, ...]:
    if shown is None:
        return ()
    row, _ = shown
    shares = {"layers": row.layers_share, "parameters": row.parameters_share}
    shares |= {"a token's time, as forecast for an A100": row.time_share or 0.0}
    where = f"{COMPARISON_FILE}: rows, {row.criterion}, n = {row.n}"
    return tuple(Fact(name, Number.share(share), where) for name, share in shares.items() if share)


def _warnings(comparison: CriteriaComparison) -> list[str]:
    found = []
    if not comparison.ended:
        rows = f"{len(comparison.rows)} rows are measured"
        found.append(f"the comparison is incomplete: {rows}; the same command resumes it")
    found += [f"{name} could not be compared: {why}" for name, why in comparison.failures.items()]
    found += [f"{name} could not choose: {why}" for name, why in comparison.skipped.items()]
    sizes = [model.parameters for model in comparison.models if model.parameters is not None]
    found += small_model(min(sizes, default=None))
    counts = [model.whole.num_texts for model in comparison.models if model.whole]
    found += few_texts(min(counts)) if counts else []
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
        found += [
            f"{task.task} is at chance already with all layers ({task}): what is lost there says "
            f"nothing"
            for task in model.tasks
            if task.at_chance
        ]
    return found


def _settings(comparison: CriteriaComparison) -> Section:
    place = COMPARISON_FILE
    sizes = sorted({row.n for row in comparison.rows}) or comparison.settings.get("n", ())
    facts = (
        Fact("models", ", ".join(model.title for model in comparison.models), f"{place}: models"),
        Fact("dtype", _dtypes(comparison) or "not known", f"{place}: models"),
        Fact("judge", judge_words(comparison.judge, comparison.unit), f"{place}: judge"),
        Fact("texts", splits_words(comparison.splits), f"{place}: splits"),
        Fact("sizes", ", ".join(map(str, sizes)), f"{place}: rows"),
        Fact("criteria", ", ".join(comparison.criteria) or "none", f"{place}: rows"),
        Fact("tokens of a text", f"at most {comparison.max_length:,}", f"{place}: max_length"),
        *_more_settings(comparison),
    )
    line = "Every loss is of the test set, which no criterion has seen."
    return Section("Settings", (line,) if comparison.rows else (), facts)


def _more_settings(comparison: CriteriaComparison) -> list[Fact]:
    """The patch, the tasks and the prompts, where there are some."""
    place, settings = f"{COMPARISON_FILE}: settings", comparison.settings
    found = []
    if settings.get("patch"):
        found.append(Fact("patch", patch_words(settings), place))
    for model in comparison.models[:1]:
        if model.tasks:
            found.append(Fact("tasks", ", ".join(one.task for one in model.tasks), place))
        if model.speech is not None:
            found.append(Fact("prompts of speech", f"{model.speech.num_prompts:,}", place))
    return found


def _group(group: Group, place: int, comparison: CriteriaComparison, drawn: bool) -> Section:
    model = group.model
    experts = f", {model.num_experts} experts a router" if model.num_experts else ""
    lines = [
        f"{whole_words(whole_of(group))} It has {model.num_layers} layers{experts}.",
        f"Judge: {judge_words(comparison.judge, comparison.unit)}; texts: "
        f"{splits_words(comparison.splits)}.",
    ]
    if model.accuracy is not None:
        chance = "" if model.chance is None else f"; chance {Number.share(model.chance, 1).text}"
        right = Number.share(model.accuracy, 1).text
        lines.append(f"Accuracy of the whole model {right}{chance}.")
    if "recommended" in group.criteria:
        lines.append("What is recommended was chosen by losses after a quick patch.")
    tables = [losses_table(group, state) for state in group.states]
    tables += [scores_table(group, task, state) for task in model.tasks for state in group.states]
    if model.speech is not None:
        tables += [speech_of_cuts(group, model.speech, state) for state in group.states]
    return Section(
        f"{group.title}: what it loses by each cut",
        tuple(lines),
        tables=(*tables, *taus_tables(group), *failures_tables(group)),
        drawings=tuple(group_charts(group, place) if drawn else []),
    )


def _numbers(comparison: CriteriaComparison) -> Section:
    def facts(model: ComparedModel) -> list[Fact]:
        place = f"{COMPARISON_FILE}: models, {model.title}"
        found = [loss_fact(f"{model.title}, whole", model.whole, place)] if model.whole else []
        if model.accuracy is not None:
            found.append(Fact(f"{model.title}, accuracy", Number.share(model.accuracy, 1), place))
        found += [
            Fact(
                f"{model.title}, {task.task}, {task.metric}",
                Number(str(task), task.mean),
                f"{place}; {counted(len(task.items), 'item')} with "
                f"{counted(task.num_shots, 'solved example')}",
            )
            for task in model.tasks
        ]
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
