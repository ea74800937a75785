"""Work counted before it is done, in one way for studies and single commands, bars and dry runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import length_hint
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import TextsError
from ..memory.streaming import Pass, StreamPlan, plan_stream
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from ..patching.descent import draw_steps, num_steps
from ..patching.memory import DEFAULT_PATCH_BATCH
from ..patching.patch import fitted_tokens
from ..patching.solver import STEPPING, PatchLayers
from ..patching.states import divide
from ..processes import slowed, worked
from ..results.speech import WAYS
from ..settings.recipe import GLOBAL_BATCH, Resolved
from ..texts.batches import tokenise
from ..texts.sources import Texts, own_texts
from ..values.estimates import Time
from ..values.plan import Plan
from ..values.tokens import Tokens
from .speed import Work, measure_speed

SAMPLED = 256
"""Texts that are tokenised to know how long all are."""

HEAD_STEP = 3
"""Runs of the head that take as long as a step of training through it, about."""

TOGETHER = 4
"""States of a text, of those that make room for passes of single ones, where cuts run together."""

CHECKED: Pass = (2, 0)
"""A model runs on one text, whole and layer by layer."""

Lengths = NDArray[Any]
"""(S,) tokens of texts or prompts."""


@dataclass(frozen=True, slots=True)
class Counted:
    """The work that one model is to do, on texts of a mean length, so many a forward."""

    source: ModelSource
    work: Work
    texts: int
    length: float


def forecast(*parts: Counted, beside: str = "", at_least: bool = False) -> Time:
    """Forecast the time of a command, with what it has read and imported; a model loads once."""
    seconds = worked()
    for one in parts:
        work, length = one.work + Work(loads=1), max(2, round(one.length))
        speed = measure_speed(one.source.resolved(), texts=one.texts, length=length, work=work)
        seconds += work.seconds(speed)
    return Time(seconds, beside, at_least, *slowed(torch.get_num_threads()))


def count_texts(texts: Iterable[str]) -> int:
    """Count texts before they are read; TextsError where their number is not known."""
    count = texts.count() if isinstance(texts, Texts) else length_hint(texts)
    if not count:
        raise TextsError("the number of texts is not known here")
    return count


def lengths_of(tokenizer: Any, texts: Iterable[str], max_length: int) -> Lengths:
    """Give the tokens of texts, (S,); those behind the first are as long as these on average."""
    first = [len(one.ids) for one in tokenise(tokenizer, islice(texts, SAMPLED), max_length)]
    count = count_texts(texts)
    return np.array([*first, *[np.mean(first)] * (count - len(first))], np.float64)[:count]


def plan_passes(
    source: ModelSource, passes: Sequence[Pass], *, num_compared: float = 0
) -> StreamPlan:
    """Plan what passes over streamed layers read, at most, about.

    All states of ``num_compared`` tokens of a pass are kept. FileNotFoundError: weights are unknown
    here.
    """
    source = source.resolved()
    files, dtype = source.weight_files, plain_dtype(source.dtype)
    if not files:
        raise FileNotFoundError("the weights are not known here")
    return plan_stream(source.read_config(), files, dtype, passes=passes, num_compared=num_compared)


def run(lengths: Any, layers: float, heads: float = 0, *, passes: float = 0) -> Work:
    """Count layers and heads that are run on texts of some lengths, and what their passes hold."""
    tokens = float(lengths.sum())
    held = max(1.0, TOGETHER * heads / passes) if passes else 0.0
    counted = ((passes, held * tokens),) if passes else ()
    return replace(Work(layers, heads) * tokens, passes=counted)


def written(layers: int, num_tokens: float) -> Work:
    """Count tokens of answers, written one by one."""
    return Work(decoded_layers=layers * num_tokens, decoded_heads=num_tokens)


def spoken(layers: int, whole: int, prompts: Lengths, *, num_tokens: int) -> Work:
    """Count how a model of some layers generates, judged by one of ``whole`` layers.

    It writes, and both run on words: on those of the whole model, which are compared, and on its
    own. The whole model runs on its words once more.
    """
    words = len(WAYS) * len(prompts) * num_tokens
    tokens = len(WAYS) * float(prompts.sum()) + words
    passes = layers + whole * (1 + (layers == whole))
    runs = Work(passes * tokens, 3.0 * words, compared=words)
    return written(layers, words) + runs


def patched(layers: PatchLayers, *, fitted: float, held: float, steps: int, each: float) -> Work:
    """Count a full patch on so many tokens, and so many held out, by steps of ``each`` tokens."""
    stepped = steps * min(fitted, each)
    run = layers.times(fitted=fitted, held_out=held, descended=fitted, stepped=stepped)
    heads = (4 + layers.num_blocks) * held + HEAD_STEP * stepped
    return Work(run, heads, passes=(CHECKED, (layers.passes(steps), 0)))


def trained(recipe: Resolved, left: int, whole: int, *, length: float, held: float) -> Work:
    """Count a training of ``left`` layers on texts of a mean length, and its evaluations.

    ``held`` are the held-out tokens; a teacher has ``whole`` layers.
    """
    tokens = recipe.steps * GLOBAL_BATCH * (recipe.max_length if recipe.packing else length)
    teacher = Work(whole, 1) * (tokens * recipe.has_teacher)
    evaluated = (recipe.steps // recipe.eval_every + 2) * held
    steps = Work(STEPPING * left, HEAD_STEP) * tokens
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
    """Count a patch, its losses on ``held_out`` and our own texts, and answers that are written."""
    source = source.resolved()
    tokenizer, layers = source.load_tokenizer(), source.count_layers()
    most = num_tokens or fitted_tokens(not torch.cuda.is_available())
    batches = divide(tokenizer, texts, tokens=tokens, num_tokens=most)
    fitted, held = (np.concatenate([x.attention_mask.sum(1) for x in some]) for some in batches)
    drawn, steps = draw_steps(batches[0]), num_steps(batches[0])
    stepped = sum(batches[0][index].attention_mask.sum() for step in drawn for index in step)
    work = patched(
        PatchLayers.of(layers, dropped),
        fitted=fitted.sum(),
        held=held.sum(),
        steps=steps,
        each=stepped / len(drawn),
    )
    work += written(layers, num_written) + Work(passes=((1, 0),))  # and it is saved
    for some in (held_out, own_texts()) if held_out else ():
        lengths = lengths_of(tokenizer, some, tokens.max_length)
        work += run(lengths, 3 * layers - 2 * len(dropped), 3, passes=3)
    return Counted(source, work, DEFAULT_PATCH_BATCH, fitted.mean())


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
    """Count a healing of a cut, and its original; weights of 4 and 8 bits as plain ones."""
    dtype: Any = "float32" if recipe.dtype == "float32" else "bfloat16"
    source = replace(cut, dtype=dtype)
    tokenizer, left, whole = source.load_tokenizer(), len(plan.survivors), plan.num_layers
    held = np.zeros(1) if held_out is None else lengths_of(tokenizer, held_out, recipe.max_length)
    length = recipe.max_length
    if not recipe.packing and texts:
        length = lengths_of(tokenizer, texts, length).mean()
    work = trained(recipe, left, whole, length=length, held=float(held.sum()))
    work += (run(held, left, 1) + Work(loads=1)) * merge
    found = [Counted(source, work, recipe.batch_size, length)]
    if original is not None:
        more = run(held, whole, 1) + written(whole, num_written)
        uncut = replace(original, dtype=dtype)
        if from_patch:
            own = of_patch(
                uncut, plan.dropped, texts, tokens=Tokens(recipe.max_length, 16), num_tokens=None
            )
            more += own.work + run(held, left, 1)
        found.append(Counted(uncut, more, recipe.batch_size, length))
    return found
