"""Speed: what one layer and the head of a model take on this machine, on random weights.

One layer is built from the config, in the dtype and on the device to use, and really runs.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ModelError, one_sentence
from ..evaluation.loss import summed_losses
from ..memory.device import available_bytes, main_device
from ..memory.rehearsal import build_empty
from ..memory.weights import module_bytes, num_parameters
from ..models.architecture import find_layers
from ..models.dtypes import STREAM
from ..models.layerwise import Layerwise, token_rows
from ..models.loading import layers_of
from ..models.source import ModelSource
from ..patching.changes import Changes
from ..patching.descent import MovingMatrix, divergence_gradients, matrices
from ..savings.timing import settle
from ..scanning.expert_hooks import ExpertHooks
from ..texts.batches import Batch
from ..values.estimates import Unknown
from .forecast import shortened

ENOUGH, LEAST, MOST = 0.4, 3, 40
"""Seconds of the repeats of a timing, about, and how many there are at least and at most."""

SLICE = 0.02
"""Seconds of one repeat, about: short ones are now and then not disturbed on a busy machine."""

BLOCK = 1 << 16
"""Random values that fill the weights, again and again."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done, by what takes time; tokens where nothing else is said.

    Attributes:
        layers: through a layer forward, times layers.
        heads: through the final norm and the head, to their losses.
        layer_steps: through a layer forward and backward, times layers.
        head_steps: through the head for both models of a descent, and back.
        updates: steps of all matrices of a layer, times layers.
        decoded_layers: decoded one by one, times layers.
        decoded_heads: decoded one by one.
        flops: of equations that are solved.
        observed: as ``layers``, where statistics of their experts are gathered.
    """

    layers: float = 0
    heads: float = 0
    layer_steps: float = 0
    head_steps: float = 0
    updates: float = 0
    decoded_layers: float = 0
    decoded_heads: float = 0
    flops: float = 0
    observed: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(value * times for value in self._values()))

    def seconds(self, each: "Work") -> float:
        """The seconds of all, by those of each."""
        return sum(a * b for a, b in zip(self._values(), each._values(), strict=True))

    def _values(self) -> list[float]:
        return [getattr(self, one.name) for one in fields(self)]


def told(way: Callable[[], Any]) -> Any:
    """What something takes; or why that cannot be told, whatever a family does without weights."""
    try:
        return way()
    except Exception as error:
        return Unknown(one_sentence(error))


def device_of(source: ModelSource) -> torch.device:
    """The device that computes with a resolved model; layers that wait on disk come to a GPU."""
    waits = source.waits_on_disk and torch.cuda.is_available()
    on_cpu = str(source.device_map) in ("None", "cpu", STREAM) and not waits
    return torch.device("cpu") if on_cpu else main_device()


def measure_speed(source: ModelSource, *, texts: int, length: int, work: Work) -> Work:
    """Measure the seconds of each kind of work that there is any of, with a resolved model.

    Batches are as given, or of fewer texts. ModelError if a model of this kind cannot be timed.
    """
    config, dtype, device = source.read_config(), str(source.dtype), device_of(source)
    if dtype in ("nf4", "int8"):
        raise ModelError(f"weights in {dtype} are not timed before they are loaded")
    total = layers_of(config) or 1
    whole = build_empty(config, getattr(torch, dtype))
    last = num_parameters(find_layers(whole).modules[-1])
    mean = sum(map(num_parameters, find_layers(whole).modules)) / total / last
    model = build_empty(shortened(config, total - 1), getattr(torch, dtype))
    if 3 * module_bytes(model) > available_bytes(device):
        raise ModelError("there is not enough memory to time a layer")
    model = model.to_empty(device=device)
    _fill(model)
    kinds = {one.name for one in fields(work) if getattr(work, one.name)} | {"layers"}
    found = _timed(Layerwise(model), texts, length, kinds)
    of_layers = {"layers", "observed", "layer_steps", "updates", "decoded_layers"}
    return Work(**{k: v * (mean if k in of_layers else 1.0) for k, v in found.items()})


def _timed(model: Layerwise, texts: int, length: int, kinds: Collection[str]) -> dict[str, float]:
    """The seconds of some kinds of work with a model of one layer."""
    one = _batch(1, length)
    took = _seconds(lambda: model.run(one, model.embed(one), (0,)), model.head.decoder.device)
    batch = _batch(max(1, min(texts, int(SLICE / max(took, 1e-9)))), length)
    states, single = model.embed(batch), _batch(1, 1)
    tokens, decoding = batch.input_ids.size, model.embed(single)
    layer = model.modules[0]
    moving = [MovingMatrix(*found) for found in matrices(layer)]
    weights = [getattr(one.module, one.name) for one in moving]
    changes = Changes()
    if "observed" in kinds:
        observed = ExpertHooks(model.head.decoder)

    def step() -> None:
        model.trace(batch, states, 0, weights=weights).gradients(states.float())

    def update() -> None:
        for one in moving:
            one.step(getattr(one.module, one.name).float(), 0.0, changes)

    def run_head(some: Batch, given: torch.Tensor) -> None:
        with model.starting_from(given, ()):
            summed_losses(model.head, some)

    def observe() -> None:
        with observed:
            observed.turn_to(batch)
            model.run(batch, states, (0,))
            observed.turn_to(None)

    rows = token_rows(batch, states)

    def descend_head() -> None:
        divergence_gradients(model.head, rows, rows)

    two = _batch(1, 2)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "layers": (lambda: model.run(batch, states, (0,)), tokens),
        "observed": (observe, tokens),
        "heads": (lambda: run_head(batch, states), tokens),
        "layer_steps": (step, tokens),
        "head_steps": (descend_head, tokens),
        "updates": (update, 1),
        "decoded_layers": (lambda: model.run(single, decoding, (0,)), 1),
        "decoded_heads": (lambda: run_head(two, model.embed(two)), 1),
    }
    with torch.no_grad():
        found = {
            name: _seconds(way, states.device) / units
            for name, (way, units) in ways.items()
            if name in kinds
        }
    changes.undo()
    return {**found, "flops": found["layers"] / (2 * num_parameters(layer))}


def _batch(texts: int, length: int) -> Batch:
    ids = np.arange(texts * length, dtype=np.int64).reshape(texts, length) % 64
    return Batch(ids, np.ones((texts, length), np.int64), np.arange(texts))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least time of some work, as if nothing else ran: of a CPU it leaves out what others take.

    There all threads count as one where others run, so it is more than it would be alone.
    """
    work()
    walls: list[float] = []
    alone: list[float] = []
    while len(walls) < LEAST or (sum(walls) < ENOUGH and len(walls) < MOST):
        settle(device)
        started, busy = time.perf_counter(), time.process_time()
        work()
        settle(device)
        walls.append(time.perf_counter() - started)
        alone.append(time.process_time() - busy)
    return min(walls) if device.type == "cuda" else min(*walls, *alone)


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
