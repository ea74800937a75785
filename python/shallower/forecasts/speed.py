"""Speed: what one layer and the head of a model take on this machine, on random weights.

One layer is built from the config, in the dtype and on the device to use, and really runs.
"""

import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ModelError, one_sentence
from ..evaluation.answers import AT_ONCE
from ..evaluation.loss import summed_losses
from ..evaluation.speech import measures
from ..memory.device import available_bytes, main_device
from ..memory.rehearsal import build_empty
from ..memory.streaming import Pass, disk_speed
from ..memory.weights import module_bytes, num_parameters
from ..models.architecture import find_layers
from ..models.dtypes import QUANTISED, STREAM
from ..models.gguf_reading import dequantising
from ..models.layerwise import Layerwise, token_rows
from ..models.loading import layers_of
from ..models.source import ModelSource
from ..savings.timing import settle
from ..texts.batches import Batch
from ..values.estimates import unknown
from .forecast import shortened

ENOUGH, LEAST, MOST = 0.2, 5, 20
"""Seconds of the repeats of a timing, about, and how many there are at least and at most."""

SLICE = 0.02
"""Seconds of one repeat, about: short ones are now and then not disturbed on a busy machine."""

BLOCK = 1 << 16
"""Random values that fill the weights, again and again."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done, by what takes time; tokens where nothing else is said."""

    layers: float = 0  # through a layer forward, times layers
    heads: float = 0  # through the final norm and the head, to their losses
    decoded_layers: float = 0  # of answers to many prompts, one by one, times layers
    decoded_heads: float = 0  # of these, through the head
    compared: float = 0  # words whose distributions of two models are compared
    loads: float = 0  # of the model, times models
    passes: tuple[Pass, ...] = field(default=(), kw_only=True)

    def __add__(self, other: "Work") -> "Work":
        """One after the other."""
        sums = map(operator.add, self._values(), other._values())
        return Work(*sums, passes=self.passes + other.passes)

    def __mul__(self, times: float) -> "Work":
        """So many times as much, together: in the same passes, which hold as many more states."""
        passes = tuple((count, tokens * times) for count, tokens in self.passes)
        return Work(*(value * times for value in self._values()), passes=passes)

    def seconds(self, each: "Work") -> float:
        """The seconds of all, by those of each."""
        return sum(a * b for a, b in zip(self._values(), each._values(), strict=True))

    def _values(self) -> list[float]:
        return [getattr(self, one.name) for one in fields(self)[:-1]]


def or_unknown(way: Callable[[], Any]) -> Any:
    """What something takes; or why that is unknown, whatever a family does without weights."""
    try:
        return way()
    except Exception as error:
        return unknown(one_sentence(error))


def device_of(source: ModelSource) -> torch.device:
    """The device that computes with a resolved model; layers streamed from disk come to a GPU."""
    waits = source.is_streamed and torch.cuda.is_available()
    on_cpu = str(source.device_map) in ("None", "cpu", STREAM) and not waits
    return torch.device("cpu") if on_cpu else main_device()


def measure_speed(source: ModelSource, *, texts: int, length: int, work: Work) -> Work:
    """Measure the seconds of each kind of work that there is any of, in batches as given."""
    config, dtype, device = source.read_config(), str(source.dtype), device_of(source)
    if dtype in QUANTISED:
        raise ModelError(f"weights in {dtype} are not timed before they are loaded")
    total = layers_of(config) or 1
    whole = build_empty(config, getattr(torch, dtype))
    last = num_parameters(find_layers(whole).modules[-1])
    mean = sum(map(num_parameters, find_layers(whole).modules)) / total / last
    two = shortened(config, total - 2) if total > 2 else config
    model = build_empty(two, getattr(torch, dtype))
    if 3 * module_bytes(model) > available_bytes(device):
        raise ModelError("there is not enough memory to time a layer")
    model = model.to_empty(device=device)
    _fill(model)
    kinds = {one.name for one in fields(work) if getattr(work, one.name)}
    timing = _Timing(Layerwise(model), texts, length)
    found: dict[str, Any] = {name: timing.seconds(name) for name in kinds & {*_Timing.__dict__}}
    found["loads"] = _loading(source, num_parameters(whole))
    of_layers = {"layers", "decoded_layers"}
    return Work(**{k: v * (mean if k in of_layers else 1.0) for k, v in found.items()})


def _loading(source: ModelSource, parameters: int) -> float:
    """The seconds of loading weights from files that are here: as fast as they are read, or made.

    What is dequantised is copied once, too, which takes about as long.
    """
    files = source.weight_files
    if not files:
        return 0.0
    if files[0].suffix == ".gguf":
        make, values = dequantising(files[0])
        return 2 * parameters * _seconds(make, torch.device("cpu")) / values
    return source.stored_bytes / disk_speed(files[0])


class _Timing:
    """What takes time of a model of two layers: a method a kind of work, and what it does of it."""

    def __init__(self, model: Layerwise, texts: int, length: int) -> None:
        self.model = model
        self._device = model.head.decoder.device
        one = _batch(1, length)
        states = model.embed(one)
        took = _seconds(lambda: model.run(one, states, (0,)), self._device)
        self._batch = _batch(max(1, min(texts, int(SLICE / max(took, 1e-9)))), length)
        self._states = model.embed(self._batch)
        self._rows = token_rows(self._batch, self._states)
        self._answering = model.embed(_batch(AT_ONCE, 1))

    @torch.no_grad()
    def seconds(self, kind: str) -> float:
        """The seconds of one unit of some kind of work."""
        found = _seconds(getattr(self, kind), self._device)
        if kind == "decoded_layers":  # a forward of a token has much beside its layers
            found -= _seconds(self._without_last, self._device)
        return max(0.0, found) / _UNITS.get(kind, self._batch.input_ids.size)

    def _without_last(self) -> None:
        self.model.run(_batch(AT_ONCE, 1), self._answering, range(len(self.model) - 1))

    def layers(self) -> None:
        self.model.run(self._batch, self._states, (len(self.model) - 1,))

    def heads(self) -> None:
        self._run_head(self._batch, self._states)

    def decoded_layers(self) -> None:
        self.model.run(_batch(AT_ONCE, 1), self._answering, range(len(self.model)))

    def decoded_heads(self) -> None:
        self._run_head(_batch(AT_ONCE, 2), self.model.embed(_batch(AT_ONCE, 2)))

    def compared(self) -> None:
        head = self.model.head
        for logits in head.logits_from(self._rows[:64]):
            measures(logits, logits, torch.zeros(len(logits), dtype=torch.long))

    def _run_head(self, batch: Batch, states: torch.Tensor) -> None:
        with self.model.starting_from(states, ()):
            summed_losses(self.model.head, batch)


_UNITS = {"decoded_layers": AT_ONCE, "decoded_heads": AT_ONCE, "compared": 64}
"""How much a method of a timing does; the others do the tokens of its batch."""


def _batch(texts: int, length: int) -> Batch:
    ids = np.arange(texts * length, dtype=np.int64).reshape(texts, length) % 64
    return Batch(ids, np.ones((texts, length), np.int64), np.arange(texts))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least time of some work, as if nothing else ran.

    On a CPU that is the time of the processor that this thread has: it takes its share of every
    parallel loop, and what others take of a busy machine is in none of it. Before a GPU it waits.
    """
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    work()
    times: list[float] = []
    while len(times) < LEAST or (sum(times) < ENOUGH and len(times) < MOST):
        settle(device)
        started = clock()
        work()
        settle(device)
        times.append(clock() - started)
    return min(times)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Fill what has no values yet with small random ones, whole numbers with zeros."""
    drawn = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    values: Any
    for values in (*model.parameters(), *model.buffers()):
        if not values.is_floating_point():
            values.zero_()
            continue
        block = drawn.to(values)
        for part in values.view(-1).split(BLOCK):
            part.copy_(block[: len(part)])
