"""The story of a sweep: what each model bears, where its layers are alike, who chooses best."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...values.commands import command_line
from ...values.comparison import ComparedModel
from ...values.counts import counted
from ...values.estimates import splits_words
from ...values.files import SWEEP_FILE
from ...values.layers import ranges
from ...values.schema import plain
from ...values.sweep import Borne, Sweep, borne
from ..charts.comparison import Group
from ..charts.sweep import (
    Found,
    all_cuts,
    loss_charts,
    mean_regrets,
    read_found,
    regret_charts,
    scan_maps,
    start_charts,
)
from ..story import Cell, Fact, Number, Section, Story, Table
from ..words import (
    BEST_OF_SEVERAL,
    again,
    differs,
    few_texts,
    loss_fact,
    made_by,
    patch_words,
    small_model,
)

_STATES = {"cut": "as it is cut", "patched": "after a quick patch", "healed": "after a healing"}


def sweep_story(sweep: Sweep, out: Path, *, drawn: bool = True) -> Story:
    """Make the story of a sweep in a folder, of the jobs that are done; ``drawn`` with figures."""
    found = read_found(out, sweep)
    bears = [one for cuts in all_cuts(found, sweep) for one in borne(cuts, sweep.losses)]
    compared = [one.comparison for one in found if one.comparison is not None]
    first = compared[0] if compared else None
    dtypes = dict.fromkeys(model.dtype for one in compared for model in one.models if model.dtype)
    return Story(
        "sweep",
        _title(sweep, found),
        _sentence(sweep, found, bears),
        warnings=tuple(_warnings(sweep, found)),
        sections=(
            _bears(sweep, found, bears, drawn),
            _scans(found, drawn),
            _regrets(found, drawn),
            _settings(sweep, found),
            _jobs(sweep),
            _numbers(found),
            again(
                "The sweep, and this page.",
                command_line("sweep", sweep.file, "--out", out.resolve().name),
                command_line("report", out.resolve().name),
            ),
            differs(
                None if first is None else first.max_length,
                ", ".join(dtypes) or None,
                {} if first is None else first.versions,
            ),
        ),
        data=sweep_data(sweep, found),
    )


def sweep_data(sweep: Sweep, found: Sequence[Found]) -> dict[str, Any]:
    """The numbers of a sweep as plain JSON values: jobs without their command lines, best cuts,
    shares borne, starts of the most alike blocks, and mean regrets with a bound of their error.
    """
    told = ("name", "kind", "model", "texts", "state", "error")
    cuts = all_cuts(found, sweep)
    data = {
        **sweep.to_json(),
        "jobs": [{name: getattr(job, name) for name in told} for job in sweep.jobs],
        "cuts": [cut for of in cuts for cut in of],
        "borne": [one for of in cuts for one in borne(of, sweep.losses)],
        "starts": {one.title: one.starts for one in found},
        "regrets": {one.title: mean_regrets(one.group) for one in found if one.group is not None},
    }
    return {name: plain(value) for name, value in data.items()}


def _title(sweep: Sweep, found: Sequence[Found]) -> str:
    models = dict.fromkeys(job.model for job in sweep.jobs)
    sizes = {row.n for one in found if one.comparison for row in one.comparison.rows}
    criteria = {row.criterion for one in found if one.comparison for row in one.comparison.rows}
    parts = counted(len(criteria), "criterion", "criteria"), counted(len(sizes), "size")
    return f"{parts[0]} and {parts[1]} on {', '.join(models)}"


def _sentence(sweep: Sweep, found: Sequence[Found], bears: Sequence[Borne]) -> str:
    """Say what models bear at one loss in the last state that all have, and who chooses best."""
    if not bears:
        return "No job of the sweep is done yet."
    models = {one.model for one in bears}
    of_all = [
        state
        for state in sweep.states
        if {one.model for one in bears if one.state == state} == models
    ]
    state = of_all[-1] if of_all else bears[-1].state
    shares = [one for one in bears if (one.loss, one.state) == (sweep.loss, state)]
    text = (
        f"For {sweep.loss:g} nats a token more than whole so many layers can go, "
        f"{_STATES[state]}: {'; '.join(f'{one.model} {_layers(one)}' for one in shares)}."
    )
    best = {}
    for one in found:
        means = {} if one.group is None else mean_regrets(one.group)
        if means:
            best[one.title] = min(means, key=lambda name: means[name][0])
    if len(set(best.values())) == 1 and len(best) > 1:
        where = "all of them" if len(best) == len(found) else f"the {len(best)} that are compared"
        return f"{text} {next(iter(best.values()))} has the least mean regret on {where}."
    names = "; ".join(f"{name} on {title}" for title, name in best.items())
    return f"{text} Least mean regret: {names}." if names else text


def _layers(one: Borne) -> str:
    """The whole layers in a share, which alone can go."""
    least = "at least " if one.share >= one.most else ""
    return f"{least}{str(one).rpartition(', ')[2]}"


def _warnings(sweep: Sweep, found: Sequence[Found]) -> list[str]:
    told = []
    if not sweep.is_complete:
        left = sum(job.state != "done" for job in sweep.jobs)
        told.append(
            f"the sweep is incomplete: {left} of {counted(len(sweep.jobs), 'job')} are not done; "
            f"the same command asks for them alone"
        )
    told += [f"{job.name} failed: {job.error} (see {job.log})" for job in sweep.failed]
    models: list[tuple[float, str, ComparedModel]] = []
    for one in found:
        if one.comparison is not None:
            skipped = one.comparison.skipped.items()
            told += [f"{one.title}: {name} could not choose: {why}" for name, why in skipped]
            for model in one.comparison.models:
                models.append((model.parameters or math.inf, one.title, model))
    if models:
        _, title, smallest = min(models, key=lambda one: one[0])
        told += [f"{title}: {words}" for words in small_model(smallest.parameters)]
        told += few_texts(min(model.whole.num_texts for _, _, model in models))
    return told


def _settings(sweep: Sweep, found: Sequence[Found]) -> Section:
    compared = [one.comparison for one in found if one.comparison is not None]
    facts = [
        Fact("models", ", ".join(dict.fromkeys(job.model for job in sweep.jobs)), SWEEP_FILE),
        Fact("texts", ", ".join(dict.fromkeys(job.texts for job in sweep.jobs)), SWEEP_FILE),
        Fact("states", ", ".join(sweep.states), SWEEP_FILE),
        Fact("losses", ", ".join(f"{loss:g}" for loss in sweep.losses), SWEEP_FILE),
    ]
    if compared:
        facts.append(Fact("split", splits_words(compared[0].splits), "comparison.json: splits"))
    line = "Every loss is of the test set, which no criterion has seen."
    return Section("Settings", (line,), tuple(facts))


def _bears(sweep: Sweep, found: Sequence[Found], bears: Sequence[Borne], drawn: bool) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for cuts in all_cuts(found, sweep):
        own = [one for one in bears if (one.model, one.state) == (cuts[0].model, cuts[0].state)]
        shares = (Number(str(one), one.share) for one in own)
        rows.append((cuts[0].model, cuts[0].state, *shares))
    head = ("model", "state", *(f"at {loss:g} nats" for loss in sweep.losses))
    note = (
        "The share of layers at which the line through the best cut of every size first exceeds "
        "the loss, in nats a token above the whole model; in brackets by lines that are one paired "
        "standard error higher and lower; and the whole layers in it, which alone can go. ≥: the "
        "largest size that was measured stays below."
    )
    cells: list[tuple[Cell, ...]] = [
        (
            cut.model,
            cut.state,
            Number.share(cut.share, 1),
            ranges(cut.dropped).replace(", ", ",\xa0"),
            Number.estimate(cut.lost, sign=True),
            cut.criterion,
        )
        for cuts in all_cuts(found, sweep)
        for cut in cuts
    ]
    tables = [
        Table("The share of its layers that each model bears", head, tuple(rows), note),
        Table(
            "The best cut of every size",
            ("model", "state", "share", "drop", "more than whole", "by"),
            tuple(cells),
            f"Nats a token; of all criteria the one of least loss. {BEST_OF_SEVERAL}",
            is_grouped=True,
        ),
    ]
    lines = [
        f"What is healed has a {patch_words(one.curves[0].settings)} first."
        for one in found[:1]
        if one.curves
    ]
    drawings = tuple(loss_charts(found, sweep)) if drawn else ()
    title = "What each model bears"
    return Section(title, tuple(lines), tables=tuple(tables if rows else ()), drawings=drawings)


def _scans(found: Sequence[Found], drawn: bool) -> Section:
    sizes = sorted({row.n for one in found if one.comparison for row in one.comparison.rows})
    rows = tuple(
        (
            one.title,
            Number.count(start.n),
            Number.count(start.start),
            Number.of(start.spread, digits=2),
            Number.share(start.start / one.scan.num_layers),
            Number.share(start.probability),
        )
        for one in found
        for start in one.starts
        if one.scan is not None and start.n in sizes
    )
    table = Table(
        "Where the block starts whose ends are most alike",
        ("model", "n", "l*", "± layers", "of the depth", "same in"),
        rows,
        "Of a block of n layers, [l*, l* + n). Same in: the share of resamples of the texts in "
        "which it starts there; ±: the standard deviation of the start over them.",
        is_grouped=True,
    )
    drawings = (*scan_maps(found), *start_charts(found)) if drawn else ()
    title = "Where the layers are alike"
    return Section(title, tables=(table,) if rows else (), drawings=tuple(drawings))


def _regrets(found: Sequence[Found], drawn: bool) -> Section:
    groups = [one.group for one in found if one.group is not None]
    sizes = sorted({row.n for group in groups for row in group.rows})
    means = {group.title: mean_regrets(group) for group in groups}
    names = sorted({row.criterion for group in groups for row in group.rows})

    def table(title: str, note: str, cell: Any) -> Table:
        rows = tuple((name, *(cell(group, name) for group in groups)) for name in names)
        return Table(title, ("criterion", *(group.title for group in groups)), rows, note)

    tables = [
        table(
            f"Mean regret over n = {', '.join(map(str, sizes))}",
            "Nats a token behind the best choice of the same model and size. The error is at most "
            "so large: sizes are measured on the same texts. –: a choice "
            "of some size failed, or was not ranked.",
            lambda group, name: Number.of(*means[group.title].get(name, (None, None))),
        )
    ]
    tables += [
        table(
            f"Regret, n = {n}",
            f"{', '.join(dict.fromkeys(group.when for group in groups))}, paired with the best.",
            lambda group, name, n=n: _regret(group, name, n),
        )
        for n in sizes
    ]
    drawings = tuple(regret_charts(found)) if drawn else ()
    title = "Who chooses best, by model"
    return Section(title, tables=tuple(tables) if groups else (), drawings=drawings)


def _regret(group: Group, name: str, n: int) -> Number:
    """The regret of a criterion at one size, with a word where it is the best or a tie."""
    of = next((one for row, one in group.ranked(n) if row.criterion == name), None)
    if of is None:
        return Number("–")
    if of.regret.mean == 0:
        return Number("best", 0.0)
    text = Number.estimate(of.regret).text
    return Number(f"{text}{' tie' if of.tied else ''}", of.regret.mean)


def _jobs(sweep: Sweep) -> Section:
    left = [job for job in sweep.jobs if job.state != "done"]
    rows = tuple((job.kind, job.model, job.texts, job.state, job.error or "") for job in left)
    head = ("command", "model", "texts", "state", "why")
    table = Table("Jobs that are not done", head, rows)
    lines = (
        f"{len(sweep.jobs) - len(left)} of {counted(len(sweep.jobs), 'job')} are done. Their "
        f"command lines and logs are in {SWEEP_FILE}.",
    )
    return Section("Its jobs", lines, tables=(table,) if left else ())


def _numbers(found: Sequence[Found]) -> Section:
    facts = [
        loss_fact(f"{one.title}, whole", model.whole, "comparison.json: models")
        for one in found
        if one.comparison is not None
        for model in one.comparison.models
    ]
    versions = next((one.comparison.versions for one in found if one.comparison), {})
    facts += made_by(versions, "comparison.json: versions")
    line = (
        "All else is in report.json: data, with all its digits, and in the folder of each job; ± "
        "is one standard error, over texts."
    )
    return Section("Every number, and where it is from", (line,), tuple(facts))
