"""How a model speaks beside the whole one: a table for people, plain JSON values for machines."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...values.counts import counted
from ...values.scores import Estimate, Scores
from ...values.speech import WAYS, Speech
from ..story import Cell, Number, Table

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
