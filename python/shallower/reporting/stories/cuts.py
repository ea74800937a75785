"""Tables of cuts: losses, scores on tasks and speech, of each size the best first."""

import math
from collections.abc import Mapping, Sequence

from ...results.comparison import Row
from ...results.loss import Loss
from ...results.scores import TIE, Estimate, Standing
from ...results.speech import Speech
from ...results.task_scores import TaskScores
from ...settings.studies import State
from ...values.counts import counted
from ..charts.comparison import DIVERGENCES, Group
from ..story import Cell, Number, Table
from ..words import (
    BEST_OF_SEVERAL,
    abbreviated,
    range_cell,
)
from .evaluation import CURVE_MEASURES, speech_cell


def whole_of(group: Group) -> Loss:
    """The loss of the whole model of rows, which was measured."""
    assert group.model.whole is not None
    return group.model.whole


def losses_table(group: Group, state: State) -> Table:
    """Tabulate the losses of all cuts in one state, of each size the best first."""
    judged = _judged(group) if state == "cut" else ""
    head = ["n", "criterion", "drop", "loss", "of ln V", "more than whole", "regret", "verdict",
            "parameters", "layer forwards", "choice", "seconds"]  # fmt: skip
    if judged:
        head.insert(4, "divergence" if judged == "score" and _diverges(group) else judged)
    rows = _in(group, state)
    unit = group.unit if state == "cut" else "nats a token"
    return Table(
        f"Layers less, {group.words(state)}"
        if group.model.num_experts is None
        else f"Experts less of {group.model.num_experts}, {group.words(state)}",
        tuple(head),
        tuple(_cells(group, row, judged) for row in rows),
        _losses_note(group, rows, unit),
        bare=("loss",),
        wide=("of ln V", "parameters", "choice", "seconds", *(["regret"] if judged else [])),
        is_grouped=True,
    )


def _of_size(group: Group, n: int, state: State) -> list[Row]:
    """The rows of a size and a state that were measured, by regret, those without one last."""
    ranked = [row for row, _ in group.ranked(n, state)]
    known = [row for row in group.rows if (row.n, row.state) == (n, state) and not row.failed]
    return [*ranked, *(row for row in known if row not in ranked)]


def _losses_note(group: Group, rows: Sequence[Row], unit: str) -> str:
    notes = [f"Loss in nats a token; more: paired by text; regret in {unit}, paired with the best."]
    if len(group.criteria) > 1:
        tie = f"Tie: with the best of its size, within {TIE:g} standard errors."
        notes += [tie, BEST_OF_SEVERAL, "Each criterion is charged what it costs by itself."]
    as_whole = [
        f"{row.criterion} {row.n}" for row in rows if row.standing and row.standing.difference.tied
    ]
    if as_whole:
        notes.append(f"Ties with the whole model: {', '.join(as_whole)}.")
    if group.model.num_experts is not None:
        notes.append(
            "layers: of the blocks of least angular distance the one whose share is nearest; "
            "exhaustive: the best of all sets by the judge on the selection set."
        )
    return " ".join(notes)


def _judged(group: Group) -> str:
    """What a table shows of the judge beside the loss; empty where that is the judge."""
    if any(row.accuracy is not None for row in group.rows):
        return "accuracy"
    return "" if group.judge == "loss" else "score"


def _diverges(group: Group) -> bool:
    return group.judge in DIVERGENCES


def _cells(group: Group, row: Row, judged: str) -> tuple[Cell, ...]:
    """The cells of a cut: what goes, what it loses, what the choice and the state cost."""
    by_judge = {"score": [_narrow(row.score)], "accuracy": [Number.share(row.accuracy, 1)]}
    standing, size = row.standing, math.log(whole_of(group).vocab_size)
    loss, more, regret = (
        (None, None, None)
        if standing is None
        else (standing.loss, standing.difference, standing.regret)
    )
    return (
        Number.count(row.n),
        row.criterion,
        _dropped(row),
        _narrow(loss),
        *by_judge.get(judged, []),
        Number.of(None if loss is None else loss.mean / size, digits=2),
        Number.estimate(more, sign=True),
        _narrow(regret),
        _verdict(standing) if len(group.criteria) > 1 else "",
        Number.share(row.parameters_share, 1),
        Number(abbreviated(row.layer_forwards, "kMG"), row.layer_forwards),
        Number(_duration(row.choice_seconds), row.choice_seconds),
        Number.of(row.seconds, digits=0),
    )


def failures_tables(group: Group) -> list[Table]:
    """Tabulate why cuts have no loss; nothing where all have one."""
    rows = tuple(
        (Number.count(row.n), row.criterion, row.state, row.failed)
        for row in group.rows
        if row.failed
    )
    head = ("n", "criterion", "state", "why")
    return [Table("What could not be measured", head, rows)] if rows else []


MOST_NAMED = 24
"""Characters of the experts that a table names; all are in the JSON and the CSV."""


def _dropped(row: Row) -> Cell:
    if row.experts is None:
        return range_cell(row.dropped) or "–"
    fits = len(row.experts) <= MOST_NAMED
    return row.experts if fits else f"{row.experts[:MOST_NAMED]}…"


def scores_table(group: Group, whole: TaskScores, state: State) -> Table:
    """Tabulate the scores of all cuts in one state on one task."""
    rows = []
    for row in _in(group, state):
        scores = row.task(whole.task)
        less = None if scores is None else scores.minus(whole)
        verdicts = ["at chance"] if scores is not None and scores.at_chance else []
        verdicts += ["tie"] if less is not None and less.tied else []
        cells: tuple[Cell, ...] = (
            Number.count(row.n),
            row.criterion,
            _dropped(row),
            Number.estimate(scores, 1, scale=100),
            Number.estimate(less, 1, sign=True, scale=100),
            ", ".join(verdicts),
        )
        rows.append(cells)
    chance = "" if whole.chance is None else f"; chance {100 * whole.chance:.1f}"
    measure = f"{whole.metric} in %, whole model {Number.estimate(whole, 1, scale=100).text}"
    return Table(
        f"{whole.task}, {group.words(state)}: {measure}",
        ("n", "criterion", "drop", "score", "difference", "verdict"),
        tuple(rows),
        f"{counted(len(whole.items), 'item')} with "
        f"{counted(whole.num_shots, 'solved example')}{chance}; difference and "
        f"tie: with the whole model",
        is_grouped=True,
    )


def _in(group: Group, state: State) -> list[Row]:
    return [row for n in group.sizes for row in _of_size(group, n, state)]


def speech_of_cuts(group: Group, whole: Speech, state: State) -> Table:
    """Tabulate the generation of all cuts in one state beside the whole model."""
    rows: list[tuple[Cell, ...]] = []
    for row in _in(group, state):
        cells: list[Cell] = [speech_cell(name, row.speech) for name in CURVE_MEASURES]
        verdict = "repeats itself" if row.speech is not None and row.speech.repeats else ""
        rows.append((Number.count(row.n), row.criterion, _dropped(row), *cells, verdict))
    repetition = speech_cell("repetition", whole).text
    return Table(
        f"Speech, {group.words(state)}: on the words of the whole model, and on its own",
        ("n", "criterion", "drop", *CURVE_MEASURES.values(), "verdict"),
        tuple(rows),
        f"{counted(whole.num_prompts, 'prompt')}, answers of {whole.num_tokens} tokens at most; of "
        f"the whole model's 4-grams {repetition} % are repeated. Repeats itself: more than twice "
        f"as much. Errors are over prompts.",
        is_grouped=True,
    )


def _verdict(standing: Standing | None) -> str:
    if standing is None:
        return ""
    return "best" if standing.regret.mean == 0 else "tie" if standing.tied else ""


def _narrow(found: Estimate | None) -> Number:
    """Write a figure with its error in 13 characters up to 99."""
    return Number.estimate(found, 3 if found is None or abs(found.mean) < 9.9995 else 2)


def taus_tables(group: Group) -> list[Table]:
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


def _duration(seconds: float) -> str:
    """Write ``0.3 s``, ``47 s``, ``12 min``, ``3.4 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
