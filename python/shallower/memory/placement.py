"""Where a model's weights go: to GPUs or the memory of the CPU, or some of them to each."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ModelError
from ..models.architecture import beside_layers, find_layers
from ..values.estimates import OFFLOADED, WEIGHTS, MemoryPlan, format_size
from .device import available_bytes, free_memory
from .rehearsal import build_empty

_BESIDE_WEIGHTS = 1 << 30
"""Bytes that a forward of a few texts takes, at most."""


def place_for(num_bytes: int) -> Literal["auto", "cpu"] | None:
    """Where so many bytes of a model fit now: ``auto`` for the GPUs, else ``cpu``, else None."""
    needed = num_bytes + num_bytes // 8 + _BESIDE_WEIGHTS
    place = _place_for(needed)
    if place == "auto" or (place and not torch.cuda.is_available()):
        return place
    free_memory()  # of what was loaded before
    return _place_for(needed)


def _place_for(needed: int) -> Literal["auto", "cpu"] | None:
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if sum(available_bytes(card) for card in cards) >= needed:
        return "auto"
    return "cpu" if available_bytes(torch.device("cpu")) >= needed else None


def place_weights(
    config: PretrainedConfig, dtype: str, plan: MemoryPlan, *, spare: Iterable[int] = ()
) -> dict[str, int | str] | None:
    """Divide the weights of a model as a plan says; None where all stay on the device.

    The layers of ``spare``, which are dropped, go to the CPU before the others.
    """
    if not plan.parts.get(OFFLOADED):
        return None
    plain: torch.dtype = getattr(torch, dtype)
    model = build_empty(config, plain)
    budget = plan.parts[WEIGHTS]
    return map_within(model, budget, dtype=plain, device=torch.cuda.current_device(), spare=spare)


def resident_bytes(config: PretrainedConfig, dtype: str, budget: int) -> int:
    """The bytes of weights on a GPU within a budget, at least the minimum, beside one layer."""
    plain: torch.dtype = getattr(torch, dtype)
    model = build_empty(config, plain)
    sizes = [_bytes_of(layer, plain) for layer in find_layers(model).modules]
    least = _bytes_of(model, plain) - sum(sizes) + max(sizes)
    return max(budget, least)


def map_within(
    model: PreTrainedModel,
    budget: int,
    *,
    dtype: torch.dtype,
    device: int | str = 0,
    spare: Iterable[int] = (),
) -> dict[str, int | str]:
    """Divide a model between one GPU, within a budget of bytes, and the CPU's memory.

    Only layers go to the CPU, first those in ``spare``, which seldom run; one finds room on the GPU
    while it runs. The device map has one entry if all fits.
    """
    layers = find_layers(model)
    sizes = [_bytes_of(layer, dtype) for layer in layers.modules]
    total = _bytes_of(model, dtype)
    if total <= budget:
        return {"": device}
    order = dict.fromkeys((*spare, *reversed(range(len(sizes)))))
    largest, moved = max(sizes), set[int]()
    for layer in order:
        if total + largest <= budget:
            break
        moved.add(layer)
        total -= sizes[layer]
    if total + largest > budget:
        raise ModelError(
            f"{type(model).__name__} needs {format_size(total + largest)} on the device with all "
            f"its layers in the memory of the CPU, and there is room for {format_size(budget)}",
            see="streaming",
        )
    places: dict[str, int | str] = dict.fromkeys(beside_layers(model, layers.path), device)
    return places | {
        f"{layers.path}.{index}": "cpu" if index in moved else device for index in range(len(sizes))
    }


def _bytes_of(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize
