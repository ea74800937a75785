"""What an evaluation found: lines and a table for people, plain JSON values for machines."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...cutting.metadata import dataset_of, loss_results, one_result
from ...results.perplexity import Perplexity
from ...results.scores import Difference, Estimate, Scores
from ...results.speech import WAYS, Speech
from ...results.task_scores import TaskScores
from ...values.counts import counted
from ...values.plan import Plan
from ...values.schema import plain_fields
from ..story import Cell, Number, Table
from ..words import loss_words

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Values = Mapping[str, Mapping[str, Any]]
"""By ``loss``, ``perplexity`` and ``tasks``, values by model; the reference of two comes first."""


def evaluation_json(values: Values) -> dict[str, Any]:
    """Give losses, perplexities, ``tasks`` and ``speech`` by side; of two the ``difference``."""
    plain: dict[str, Any] = {}
    for kind, sides in values.items():
        if kind == "speech":
            plain[kind] = speech_json([*sides.values()])
        elif kind == "tasks":
            plain[kind] = [
                {"task": first.task, "metric": first.metric, **_compared(one)}
                for one in _by_measure(sides)
                for first in [next(iter(one.values()))]
            ]
        else:
            plain |= _compared(sides) if kind == "loss" else {kind: _compared(sides)}
    return plain


def evaluation_record(values: Values, dtype: str, plan: Plan | None) -> dict[str, Any]:
    """Give :func:`evaluation_json` with the dtype of the weights, and what a cut is without."""
    drop: dict[str, Any] = (
        {} if plan is None else {"drop": [block.to_json() for block in plan.blocks]}
    )
    if plan is not None and plan.experts is not None:
        drop["experts"] = plan.experts.to_json()
    return {**evaluation_json(values), "dtype": dtype, **drop}


def evaluation_parts(values: Values, names: Mapping[str, str]) -> list[str | Table]:
    """Give lines, and the tables of tasks and of speech; ``names`` are of the sides, in words."""
    parts: list[str | Table] = []
    for kind, sides in values.items():
        if kind in ("tasks", "speech"):
            table = tasks_table if kind == "tasks" else speech_table
            parts.append(table({names[side]: one for side, one in sides.items()}))
            continue
        words, unit = _LINES.get(kind, (partial(_figure, kind), ""))
        parts += [f"{names[side]}: {words(one)}" for side, one in sides.items()]
        if len(sides) > 1:
            first, second = sides.values()
            parts.append(_difference(second.minus(first), unit))
    return parts


def _figure(kind: str, found: Scores) -> str:
    return f"{kind} {Number.estimate(found).text}"


def _perplexity_words(found: Perplexity) -> str:
    bos = "with" if found.bos else "without"
    return (
        f"perplexity {found}, {counted(len(found.by_window), 'window')} of {found.context:,} "
        f"tokens, stride {found.stride}\n  {bos} a beginning-of-text token; "
        f"{counted(found.num_tokens, 'token')} predicted, {found.num_rest} left over"
    )


_LINES: dict[str, tuple[Callable[[Any], str], str]] = {
    "loss": (loss_words, " nats a token, paired by text"),
    "perplexity": (_perplexity_words, " nats a token, paired by window"),
}
"""The words and the unit of what has no table, by its kind."""


def tasks_table(found: Mapping[str, Sequence[TaskScores]]) -> Table:
    """Tabulate scores by task and measure, the main one first, of one model or two by name."""
    head = ["task", "measure", "items", *found, *(["difference"] if len(found) > 1 else [])]
    rows: list[tuple[Cell, ...]] = []
    for sides in _by_measure(found):
        one, *others = sides.values()
        shots = f" {one.num_shots}-shot" if one.num_shots else ""
        row: list[Cell] = [one.task, f"{one.metric}{shots}", Number.count(len(one.items))]
        row += map(_score, sides.values())
        for other in others:
            lost = other.minus(one)
            text = Number.estimate(lost, 1, sign=True, scale=100).text
            row.append(Number(f"{'= ' if lost.tied else ''}{text}", lost.mean))
        rows.append(tuple(row))
    tied = "; = a tie" if len(found) > 1 else ""
    title = f"tasks, in per cent; in brackets no better than a guess{tied}"
    return Table(title, tuple(head), tuple(rows))


def _by_measure(sides: Mapping[str, Sequence[TaskScores]]) -> Iterator[dict[str, TaskScores]]:
    """Give the sides of every task and measure."""
    for scores in zip(*sides.values(), strict=True):
        yield dict(zip(sides, scores, strict=True))


def _compared(sides: Mapping[str, Any]) -> dict[str, Any]:
    plain = {
        side: plain_fields(Estimate.of(one)) if isinstance(one, Scores) else one.to_json()
        for side, one in sides.items()
    }
    if len(sides) > 1:
        first, second = sides.values()
        plain["difference"] = second.minus(first).to_json()
    return plain


def _difference(lost: Difference, unit: str) -> str:
    tie = "; a tie, within two standard errors" if lost.tied else ""
    return f"difference: {lost}{unit}{tie}"


def _score(scores: TaskScores) -> Number:
    """Write a score; one at chance in brackets."""
    text = str(scores).removesuffix(" %")
    return Number(f"({text})" if scores.at_chance else text, scores.mean)


_ROWS = {
    "agreement": "likeliest token agrees, %",
    "acceptance": "acceptance, %",
    "divergence": "divergence, nats a token",
    "loss": "loss, nats a token",
    "departure": "tokens before the first departure",
    "loss_under_whole": "its own words: loss under the whole model",
    "repetition": "its own words: repeated 4-grams, %",
    "length": "its own words: tokens",
    "ends": "its own words: end as those of the whole model, %",
}
CURVE_MEASURES = {
    "acceptance": "acceptance, %",
    "divergence": "divergence",
    "repetition": "repeated, %",
    "loss_under_whole": "loss under whole",
}
"""Measures that a table of many models has, and their columns."""

_SHARES = ("agreement", "acceptance", "repetition", "ends")


def speech_table(found: Mapping[str, Speech]) -> Table:
    """Tabulate speech by measure, of models by name, that which others are compared with first."""
    first, *others = found.values()
    head = ["", *found, *(["difference"] if len(found) == 2 else [])]
    rows: list[tuple[Cell, ...]] = []
    for name, title in _ROWS.items():
        row: list[Cell] = [title, *(speech_cell(name, one) for one in found.values())]
        if len(found) == 2:
            lost = others[0].minus(first)[name]
            number = _number(name, lost, sign=True)
            is_tie = lost.tied and math.isfinite(lost.mean)
            row.append(replace(number, text=f"= {number.text}") if is_tie else number)
        rows.append(tuple(row))
    tied = "; = a tie" if len(found) == 2 else ""
    note = (
        f"On {counted(first.num_prompts, 'prompt')}, answers of {first.num_tokens} tokens at most, "
        f"{' and '.join(WAYS)}. The first five on the words of the whole model: acceptance is the "
        f"share of tokens that speculative decoding would accept. Errors are over prompts{tied}."
    )
    if not all(math.isfinite(one.mean("length")) for one in found.values()):
        note += (
            " A model on disk says nothing itself: each token would take a pass over its layers."
        )
    return Table("speech", tuple(head), tuple(rows), note)


def speech_json(sides: Sequence[Speech]) -> dict[str, Any]:
    """Give the speech of the last of two models, or of the one, and the ``difference``."""
    plain = sides[-1].to_json()
    if len(sides) > 1:
        lost = sides[-1].minus(sides[0])
        plain["difference"] = {name: one.to_json() for name, one in lost.items()}
    return plain


def repeats_warning(name: str, speech: Speech) -> str:
    """Say that a model repeats itself more than twice as much as the whole one."""
    own, whole = speech.of("repetition"), speech.of_whole("repetition")
    return (
        f"the {name} model repeats itself: {100 * own.mean:.1f} % of its 4-grams were there "
        f"before, and {100 * whole.mean:.1f} % of those of the whole model"
    )


def speech_cell(name: str, speech: Speech | None) -> Number:
    """Write a measure with its error, shares in per cent; a dash where there is none."""
    return _number(name, None if speech is None else speech.of(name))


def _number(name: str, found: Estimate | Scores | None, *, sign: bool = False) -> Number:
    scale, digits = (100, 1) if name in _SHARES else (1, 3)
    return Number.estimate(found, digits, sign=sign, scale=scale)


def measured_results(values: Values, names: Mapping[str, str]) -> "list[EvalResult]":
    """What was measured of a model as the hub's results; it has no words for speech.

    The model is ``model`` or ``base``, and the whole one that it is compared with ``against``.
    ``names`` are of the texts, by kind.
    """
    found = []
    for kind, sides in values.items():
        value, texts = sides.get("model", sides.get("base")), names.get(kind, "")
        if kind == "loss":
            found += loss_results(value, sides.get("against"), texts)
        elif kind == "perplexity":
            found.append(_perplexity_result(value, texts))
        elif kind == "tasks":
            found += map(_task_result, value)
    return found


def _perplexity_result(found: Perplexity, text: str) -> "EvalResult":
    windows = counted(len(found.by_window), "window")
    what = f"perplexity, {windows} of {counted(found.context, 'token')}"
    return one_result(dataset_of(text), "perplexity", found.value, stderr=found.stderr, what=what)


def _task_result(found: TaskScores) -> "EvalResult":
    of = {"dataset_type": found.task, "dataset_name": found.task}
    shots = counted(found.num_shots, "solved example")
    what = f"{found.metric} of {counted(len(found.items), 'item')}, {shots}"
    return one_result(of, found.metric, found.mean, stderr=found.stderr, what=what)
