"""Time and memory on this machine: as a device of the roofline, and of forwards of a model."""

import inspect
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..memory.device import main_device, total_bytes
from ..memory.rehearsal import LiveBytes
from ..models.architecture import evaluating
from ..models.dtypes import QUANTISED
from ..processes import first_processor
from ..results.gain import MeasuredGain
from .account import cache_of
from .devices import DEVICES, HERE, Device, known_as

_WIDTH = 2048
"""Rows and columns of the matrices that are multiplied."""

_ROWS = 512
"""Tokens that are multiplied at once, to find the peak."""

_COLUMNS = 64
"""Columns for each thread in such a product on a CPU, which then takes a millisecond or two."""

_STREAMED = 1 << 28
"""Bytes of matrices that are read in turn on a CPU, to find the bandwidth: no cache holds them."""

_STREAMED_GPU = 1 << 31

_REPEATS = 7
"""Repeats of the benchmark, of whose parts the fastest counts."""

_NORMS = 50
"""Modules of four operations each, by which a launch is measured."""

STEPS = 16
"""Tokens that are decoded after each prefill; the median of their times is one measurement."""

REPEATS = 5
"""Measurements of each model, in turns; before them both run once, untimed."""


def this_machine(dtype: str, clock: Callable[[], float] = time.perf_counter) -> Device:
    """Measure this machine, its GPU if it has one, else its CPU, by the fastest of short parts.

    Bandwidth is that of uncached vector-matrix products, the peak that of matrix products in
    ``dtype``, a launch that of an operation on one number. On a CPU the parts are so short that
    other work does not interrupt them all; the source says how much slower the usual one was.
    """
    name = "bfloat16" if dtype in QUANTISED else dtype
    device, plain = main_device(), getattr(torch, name)
    on_gpu, linear = device.type == "cuda", nn.functional.linear
    streamed = _STREAMED_GPU if on_gpu else _STREAMED
    size = _WIDTH * _WIDTH * plain.itemsize
    count = -(-streamed // size)
    with torch.inference_mode():
        # Written once, as an unwritten page of zeros lies in no memory.
        matrices = torch.full((count, _WIDTH, _WIDTH), 0.5, dtype=plain, device=device)
        row = torch.ones((1, _WIDTH), dtype=plain, device=device)
        rows = row.expand(_ROWS, _WIDTH).contiguous()

        parts = [matrices] if on_gpu else matrices.split(1)
        some = matrices[:4] if on_gpu else matrices[:1, : _COLUMNS * torch.get_num_threads()]
        streaming, multiplying, launching = times = [
            _seconds(lambda part: [linear(row, one) for one in part], parts, device, clock),
            _seconds(lambda part: [linear(rows, one) for one in part], [some] * 16, device, clock),
            _seconds(nn.Sequential(*(_Norm() for _ in range(_NORMS))), [row[:, :1]], device, clock),
        ]
    slower = max(usual / fastest for fastest, usual in times)
    return Device(
        HERE,
        title_of(device),
        {name: 2 * _ROWS * some.numel() / multiplying[0]},
        count * size / len(parts) / streaming[0],
        total_bytes(device),
        f"the fastest of short probes here; the usual one took {slower:.1f} times as long",
        launching[0] / (4 * _NORMS),
    )


def own_device() -> Device:
    """The GPU of this machine, if the table has it; else an A100 of 80 GB."""
    device = main_device()
    found = known_as(title_of(device)) if device.type == "cuda" else None
    return found or DEVICES["a100-80"]


class _Norm(nn.Module):
    """Four operations on one number, a module of its own, as models have them."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return (value * value).mean(-1, keepdim=True).add(1.0)


def _seconds(
    work: Callable[[torch.Tensor], object],
    parts: Sequence[torch.Tensor],
    device: torch.device,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """The time of work on equal parts, once it is warm: on the fastest one, and the median."""
    times = []
    for part in [*parts] * (1 + _REPEATS):
        settle(device)
        started = clock()
        work(part)
        settle(device)
        times.append(clock() - started)
    return min(times[len(parts) :]), median(times[len(parts) :])


def settle(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def title_of(device: torch.device) -> str:
    """The name of a GPU; of the CPU that of the processor, with the threads that torch takes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, threads = first_processor().get("model name"), torch.get_num_threads()
    return f"{name or platform.machine()}, {threads} thread{'s'[: threads > 1]}"


def time_forwards(
    model: PreTrainedModel,
    *,
    context: int,
    batch: int = 1,
    steps: int = STEPS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Seconds of one prefill, and of a token behind it, the median of ``steps`` greedy ones.

    Tokens are random but fixed; the process ``clock`` leaves out what others take of a busy CPU.
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
    """
    held = [*model.parameters(), *model.buffers()]
    weights = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in held}
    on_gpu = model.device.type == "cuda"
    live = LiveBytes(set(weights))
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
    with torch.no_grad(), evaluating(model), nullcontext() if on_gpu else live:
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


def time_in_turns(
    model: PreTrainedModel,
    cut: Callable[[], AbstractContextManager[object]],
    *,
    context: int,
    batch: int,
) -> MeasuredGain:
    """Time a model whole and, within ``cut``, without layers, the order reversed each time."""
    ways: tuple[Callable[[], AbstractContextManager[object]], ...] = (nullcontext, cut)
    peaks: list[int] = []
    for way in ways:
        with way():
            peaks.append(peak_bytes(model, context=context, batch=batch))
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    for repeat in range(REPEATS):
        for place in (1, 0) if repeat % 2 else (0, 1):
            with ways[place]():
                times[place].append(time_forwards(model, context=context, batch=batch))
    prefill_before, prefill_after, decode_before, decode_after = (
        tuple(time[phase] for time in of_one) for phase in (0, 1) for of_one in times
    )
    return MeasuredGain(
        title_of(model.device),
        prefill_before=prefill_before,
        prefill_after=prefill_after,
        decode_before=decode_before,
        decode_after=decode_after,
        peak_before=peaks[0],
        peak_after=peaks[1],
    )
