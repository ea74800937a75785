"""What the story of a comparison says of several models: what each bears, where they are alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...results.comparison import CUT_COLUMNS, LOSSES, Borne, ComparedModel, borne
from ...scanning.scan import Scan
from ...values.schema import flat, plain
from ..charts.comparison import Group
from ..charts.models import (
    all_cuts,
    borne_charts,
    mean_regrets,
    regret_charts,
    scan_maps,
    start_charts,
    titled_starts,
)
from ..story import Cell, Number, Section, Table
from ..words import BEST_OF_SEVERAL, range_cell


def data_of_models(groups: Sequence[Group]) -> dict[str, Any]:
    """The numbers of several models as plain JSON values: best cuts, shares borne, mean regrets."""
    cuts = all_cuts(groups)
    data = {
        "cuts": [flat(cut, CUT_COLUMNS) for of in cuts for cut, _ in of],
        "borne": [one for of in cuts for one in borne(of)],
        "regrets": {group.title: mean_regrets(group) for group in groups},
    }
    return {name: plain(value) for name, value in data.items()}


def models_sentence(groups: Sequence[Group]) -> str:
    """Say what models bear at one loss in the last state that all have, and who chooses best."""
    bears = [one for cuts in all_cuts(groups) for one in borne(cuts)]
    models = {one.model for one in bears}
    states = dict.fromkeys(one.state for one in bears)
    of_all = [
        state for state in states if {one.model for one in bears if one.state == state} == models
    ]
    if not of_all:
        return "No cut of these models could be measured."
    shares = [one for one in bears if (one.loss, one.state) == (LOSSES[1], of_all[-1])]
    text = (
        f"For {LOSSES[1]:g} nats a token more than whole so many layers can go, "
        f"{groups[0].words(of_all[-1])}: "
        f"{'; '.join(f'{one.model} {_layers(one)}' for one in shares)}."
    )
    means = {group.title: mean_regrets(group) for group in groups}
    best = {
        title: min(of, key=lambda name, of=of: of[name][0])  # type: ignore[misc]
        for title, of in means.items()
        if len(of) > 1
    }
    if len(set(best.values())) == 1 and len(best) > 1:
        where = "all of them" if len(best) == len(groups) else f"the {len(best)} that are compared"
        return f"{text} {next(iter(best.values()))} has the least mean regret on {where}."
    names = "; ".join(f"{name} on {title}" for title, name in best.items())
    return f"{text} Least mean regret: {names}." if names else text


def _layers(one: Borne) -> str:
    """The whole layers in a share, which alone can go."""
    least = "at least " if one.share >= one.most else ""
    return f"{least}{str(one).rpartition(', ')[2]}"


def bears_section(groups: Sequence[Group], drawn: bool) -> Section:
    """Say which share of its layers each model bears, and by which cuts."""
    best = all_cuts(groups)
    rows: list[tuple[Cell, ...]] = [
        (of[0][0].model, of[0][0].state, *(Number(str(one), one.share) for one in borne(of)))
        for of in best
    ]
    head = ("model", "state", *(f"at {loss:g} nats" for loss in LOSSES))
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
            Number.share(cut.layers_share, 1),
            range_cell(cut.dropped),
            Number.estimate(standing.difference, sign=True),
            cut.criterion,
        )
        for of in best
        for cut, standing in of
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
    drawings = tuple(borne_charts(groups)) if drawn else ()
    title = "What each model bears"
    return Section(title, tables=tuple(tables if rows else ()), drawings=drawings)


def starts_section(
    models: Sequence[ComparedModel], sizes: Sequence[int], *, scans: Mapping[str, Scan], drawn: bool
) -> Section:
    """Say where the most alike blocks of some sizes start; ``scans`` are drawn, by their titles."""
    rows = tuple(
        (
            title,
            Number.count(start.n),
            Number.count(start.start),
            Number.of(start.spread, digits=2),
            Number.share(start.start / model.num_layers),
            Number.share(start.probability),
        )
        for title, model, starts in titled_starts(models)
        for start in starts
        if start.n in sizes
    )
    table = Table(
        "Where the block starts whose ends are most alike",
        ("model", "n", "l*", "± layers", "of the depth", "same in"),
        rows,
        "Of a block of n layers, [l*, l* + n). Same in: the share of resamples of the texts in "
        "which it starts there; ±: the standard deviation of the start over them.",
        is_grouped=True,
    )
    drawings = (*scan_maps(scans), *start_charts(models)) if drawn else ()
    title = "Where the layers are alike"
    return Section(title, tables=(table,) if rows else (), drawings=tuple(drawings))


def regrets_section(groups: Sequence[Group], drawn: bool) -> Section:
    """Say which criterion has the least regret, by model."""
    sizes = sorted({n for group in groups for n in group.sizes})
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
    drawings = tuple(regret_charts(groups)) if drawn else ()
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
