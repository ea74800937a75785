"""A model divided between one GPU and the memory of the CPU, within a budget."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .architecture import find_layers


def map_within(
    model: PreTrainedModel,
    budget: int,
    *,
    dtype: torch.dtype,
    device: int | str = 0,
    spare: Iterable[int] = (),
) -> dict[str, int | str]:
    """Divide a model between one GPU and the memory of the CPU.

    What is not a layer stays on the GPU. Of the layers, as many go to the CPU as must, and one
    of them finds room on the GPU while it runs.

    Args:
        model: on the meta device, or with weights.
        budget: bytes of weights that the GPU takes.
        dtype: that the weights are loaded in.
        device: the GPU.
        spare: layers that go to the CPU before the others, because they seldom run.

    Returns:
        A device map as :func:`load_model` takes it; of one entry where all fits.

    Raises:
        ModelError: not even one layer at a time fits beside what is not a layer.
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
            f"{type(model).__name__} needs {total + largest:,} bytes on the device with all its "
            f"layers in the memory of the CPU, and there is room for {budget:,}"
        )
    places: dict[str, int | str] = dict.fromkeys(_beside(model, layers.path), device)
    return places | {
        f"{layers.path}.{index}": "cpu" if index in moved else device for index in range(len(sizes))
    }


def _beside(module: nn.Module, path: str, prefix: str = "") -> Iterator[str]:
    """The names of the largest parts of a module that have no part in the list at ``path``."""
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name
    for name, child in module.named_children():
        full = prefix + name
        if path.startswith(full + "."):
            yield from _beside(child, path, full + ".")
        elif full != path:
            yield full


def _bytes_of(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize
