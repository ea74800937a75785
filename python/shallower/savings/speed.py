"""The time of a prefill and of a token on this machine, and the memory at the peak."""

import inspect
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..memory.rehearsal import LiveBytes
from ..models.architecture import evaluating
from .account import cache_of
from .machine import settle

STEPS = 16
"""Tokens that are decoded after each prefill; the median of their times is one measurement."""

REPEATS = 5
"""Measurements of each model, in turns; before them both run once, untimed."""


def time_forwards(
    model: PreTrainedModel,
    *,
    context: int,
    batch: int = 1,
    steps: int = STEPS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Time one prefill, and the tokens behind it.

    Args:
        model: a causal language model, on its device.
        context: tokens of every text, drawn at random, always the same.
        batch: texts in a forward.
        steps: tokens that are decoded one after the other, each the likeliest.
        clock: seconds; that of the process leaves out what others take of a busy CPU.

    Returns:
        Seconds of the prefill, and of a decoded token: the median of ``steps`` forwards with a
        cache of transformers.
    """
    device = model.device
    with torch.inference_mode(), evaluating(model):
        ids = _ids(model, context, batch)
        times, cache = [], dict[str, Any]()
        for _ in range(1 + steps):
            settle(device)
            started = clock()
            ids, cache = _forward(model, ids, cache)
            settle(device)
            times.append(clock() - started)
    return times[0], median(times[1:])


def peak_bytes(model: PreTrainedModel, *, context: int, batch: int = 1) -> int:
    """Measure the bytes that a prefill and two tokens hold at most, the weights among them.

    On a GPU they are those that torch's allocator gave; on a CPU the storages of all tensors, as
    they come and go. What kernels and libraries hold beside tensors is not in them.

    Args:
        model: a causal language model, on its device.
        context: tokens of every text.
        batch: texts in a forward.

    Returns:
        The bytes.
    """
    held = [*model.parameters(), *model.buffers()]
    weights = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in held}
    on_gpu = model.device.type == "cuda"
    live = LiveBytes(set(weights))
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
    with torch.no_grad(), evaluating(model):
        if on_gpu:
            _decode(model, context, batch)
        else:
            with live:
                _decode(model, context, batch)
    beside = torch.cuda.max_memory_allocated(model.device) - before if on_gpu else live.peak
    return sum(weights.values()) + beside


def _decode(model: PreTrainedModel, context: int, batch: int) -> None:
    chosen, cache = _forward(model, _ids(model, context, batch), {})
    for _ in range(2):
        chosen, cache = _forward(model, chosen, cache)


def _ids(model: PreTrainedModel, context: int, batch: int) -> torch.Tensor:
    table: Any = model.get_input_embeddings()
    vocabulary = len(table.weight)
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (batch, context), generator=drawn).to(model.device)


def _forward(
    model: PreTrainedModel, ids: torch.Tensor, cache: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Run a forward, and choose the next token of every text."""
    takes = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    output = model(input_ids=ids, use_cache=True, **last, **cache)
    return output.logits[:, -1:].argmax(-1), dict([cache_of(output)])
