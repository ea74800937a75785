"""Work of the stages, counted before it is done: of studies and of single commands alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import length_hint
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import TextsError
from ..memory.rehearsal import build_empty
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from ..patching.descent import STEP_TOKENS, most_steps
from ..patching.memory import DEFAULT_PATCH_BATCH, writer_widths
from ..patching.patch import CPU_TOKENS, NUM_TOKENS
from ..patching.states import MAX_HELD_OUT
from ..processes import worked
from ..texts.batches import tokenise
from ..texts.sources import Texts
from ..values.estimates import Time
from ..values.forwards import Forwards
from ..values.layers import blocks_of
from ..values.plan import Plan
from ..values.recipe import GLOBAL_BATCH, Resolved
from ..values.speech import WAYS
from ..values.tokens import Tokens
from .speed import Work, measure_speed

SAMPLED = 256
"""Texts that are tokenised to know how long all are."""

SOLVES = 12
"""Systems of equations that a full patch solves before each block, about."""

Lengths = NDArray[Any]
"""(S,) tokens of texts or prompts."""


@dataclass(frozen=True, slots=True)
class Counted:
    """The work that one model is to do, on texts of a mean length, so many a forward."""

    source: ModelSource
    work: Work
    texts: int
    length: float


def forecast(*parts: Counted, beside: str = "") -> Time:
    """Forecast the time of a command: of what it has read and imported so far, and of its work.

    Each model is loaded once. ModelError for what cannot be timed.
    """
    seconds = worked()
    for one in parts:
        work, length = one.work + Work(loads=1), max(2, round(one.length))
        speed = measure_speed(one.source.resolved(), texts=one.texts, length=length, work=work)
        seconds += work.seconds(speed)
    return Time(seconds, beside)


def lengths_of(tokenizer: Any, texts: Iterable[str], max_length: int) -> Lengths:
    """Give the tokens of texts, (S,); those behind the first are as long as these on average.

    TextsError where their number is not known.
    """
    first = [len(one.ids) for one in tokenise(tokenizer, islice(texts, SAMPLED), max_length)]
    count = texts.count() if isinstance(texts, Texts) else length_hint(texts)
    if not count:
        raise TextsError("the number of texts is not known here")
    return np.array([*first, *[np.mean(first)] * (count - len(first))], np.float64)[:count]


def run(forwards: Forwards, lengths: Any) -> Work:
    """Count layers and heads that are run on texts of some lengths."""
    return Work(forwards.layers, forwards.heads) * float(lengths.sum())


def written(layers: int, num_tokens: float) -> Work:
    """Count tokens of answers, written one by one."""
    return Work(decoded_layers=layers * num_tokens, decoded_heads=num_tokens)


def spoken(layers: int, whole: int, prompts: Lengths, *, num_tokens: int) -> Work:
    """Count how a model of some layers speaks, judged by one of ``whole`` layers.

    It writes, and both run on words: on those of the whole model, which are compared, and on its
    own. The whole model runs on its words once more.
    """
    words = len(WAYS) * len(prompts) * num_tokens
    tokens = len(WAYS) * float(prompts.sum()) + words
    passes = layers + whole * (1 + (layers == whole))
    runs = Work(passes * tokens, 3.0 * words, compared=words)
    return written(layers, words) + runs


def solved(model: nn.Module, n: int, tokens: float, *, solves: float = SOLVES) -> Work:
    """Count the equations before each block, about every second layer that goes ending one."""
    inputs, width = writer_widths(model)
    flops = 2 * tokens * inputs * (inputs + width)
    flops += solves * (inputs**3 / 3 + 2 * inputs**2 * width)
    return Work(flops=flops * (n + 1) / 2)


def patched(
    model: nn.Module, layers: int, dropped: Sequence[int], *, fit: Lengths, most: int
) -> Work:
    """Count a full patch that fits ``most`` tokens of texts of some lengths at most.

    Both models run side by side, losses are measured to choose by, and the descent is of all
    layers from the one before the first block on.
    """
    n, blocks = len(dropped), len(blocks_of(sorted(dropped)))
    left = layers - n - min(dropped) + 1
    fitted = min(most, 7 / 8 * fit.sum())
    held = min(MAX_HELD_OUT, most, fit.sum() / 8)
    steps = most_steps(fitted)
    descended = steps * min(fitted, STEP_TOKENS)
    losses = Work(left, 1) * (held * (4 + blocks))
    states = Work((layers + 3 * blocks) * (fitted + held))
    descent = Work(layer_steps=descended * left, head_steps=descended, updates=float(steps * left))
    return losses + states + descent + solved(model, 2 * blocks - 1, 2 * (fitted + held))


def trained(recipe: Resolved, left: int, whole: int, *, length: float, held: float) -> Work:
    """Count a training of ``left`` layers on texts of a mean length, and its evaluations.

    ``held`` are the held-out tokens; a teacher has ``whole`` layers.
    """
    tokens = recipe.steps * GLOBAL_BATCH * (recipe.max_length if recipe.packing else length)
    teacher = Work(whole, 1) * (tokens * recipe.has_teacher)
    evaluated = (recipe.steps // recipe.eval_every + 2) * held
    steps = Work(layer_steps=tokens * left, head_steps=tokens)
    return teacher + steps + Work(left, 1) * evaluated


def of_patch(
    source: ModelSource,
    dropped: Sequence[int],
    texts: Iterable[str],
    *,
    tokens: Tokens,
    num_tokens: int | None,
    held_out: Sequence[str] = (),
    num_written: int = 0,
) -> Counted:
    """Count a patch, three losses on ``held_out``, and answers that the whole model writes."""
    source = source.resolved()
    model = build_empty(source.read_config(), plain_dtype(source.dtype))
    tokenizer, layers = source.load_tokenizer(), source.count_layers()
    fit = lengths_of(tokenizer, texts, tokens.max_length)
    most = num_tokens or (NUM_TOKENS if torch.cuda.is_available() else CPU_TOKENS)
    work = patched(model, layers, dropped, fit=fit, most=most) + written(layers, num_written)
    if held_out:
        lengths = lengths_of(tokenizer, held_out, tokens.max_length)
        work += run(Forwards(3 * layers - 2 * len(dropped), 3), lengths)
    return Counted(source, work, DEFAULT_PATCH_BATCH, fit.mean())


def of_healing(
    cut: ModelSource,
    plan: Plan,
    recipe: Resolved,
    *,
    texts: Iterable[str],
    held_out: Iterable[str] | None,
    original: ModelSource | None,
    from_patch: bool,
    merge: bool,
    num_written: int = 0,
) -> list[Counted]:
    """Count a healing: that of the cut, and what its original does for it.

    Weights of 4 and 8 bits are counted as the plain ones that they are multiplied as.
    """
    dtype: Any = "float32" if recipe.dtype == "float32" else "bfloat16"
    source = replace(cut, dtype=dtype)
    tokenizer, left, whole = source.load_tokenizer(), len(plan.survivors), plan.num_layers
    held = np.zeros(1) if held_out is None else lengths_of(tokenizer, held_out, recipe.max_length)
    length = recipe.max_length
    if not recipe.packing and texts:
        length = lengths_of(tokenizer, texts, length).mean()
    work = trained(recipe, left, whole, length=length, held=float(held.sum()))
    work += (run(Forwards(left, 1), held) + Work(loads=1)) * merge
    found = [Counted(source, work, recipe.batch_size, length)]
    if original is not None:
        more = run(Forwards(whole, 1), held) + written(whole, num_written)
        uncut = replace(original, dtype=dtype)
        if from_patch:
            own = of_patch(
                uncut, plan.dropped, texts, tokens=Tokens(recipe.max_length, 16), num_tokens=None
            )
            more += own.work + run(Forwards(left, 1), held)
        found.append(Counted(uncut, more, recipe.batch_size, length))
    return found
