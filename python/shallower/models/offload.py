"""Weights that wait in the CPU's memory, or on disk, until their forward: accelerate's hooks.

Such a weight is on the meta device but for the forward of its module, whose hook brings it from
a map of stored tensors. To change it, change the stored tensor.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError


def execution_device(module: nn.Module) -> torch.device | None:
    """Find the device that a hook brings a module's weights to; None where none moves them."""
    for hook in _hooks(module):
        if hook.offload and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether hooks bring weights of a module, or of a part of it, for a forward alone."""
    return any(hook.offload for part in module.modules() for hook in _hooks(part))


def stored_weight(module: nn.Module, name: str) -> torch.Tensor:
    """Find the tensor in which a weight is stored, which its hook brings it from if it has one."""
    for hook in _hooks(module):
        if hook.weights_map is not None and name in hook.weights_map:
            stored: torch.Tensor = hook.weights_map[name]
            return stored
    parameter: torch.Tensor = getattr(module, name)
    return parameter


def write_weight(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Change a weight where it is stored, and where a resident module has it now.

    The new values may be of any dtype, on any device.
    """
    stored, live = stored_weight(module, name), getattr(module, name)
    stored.copy_(value)
    if live is not stored and not live.is_meta:
        live.copy_(value)


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Keep the offloaded weights of a module on its device for as long as the body runs."""
    with ExitStack() as stack:
        for part in module.modules():
            for hook in _hooks(part):
                if hook.offload:
                    stack.enter_context(_held(part, hook))
        yield


@contextmanager
def _held(module: nn.Module, hook: AlignDevicesHook) -> Iterator[None]:
    hook.pre_forward(module)
    hook.offload = False
    try:
        yield
    finally:
        hook.offload = True
        hook.post_forward(module, None)


def require_no_disk(model: PreTrainedModel) -> None:
    """Refuse a model with weights on disk, where they cannot be changed.

    Raises:
        ModelError: a part of it is offloaded to disk.
    """
    places = getattr(model, "hf_device_map", {})
    if on_disk := [name for name, place in places.items() if str(place) == "disk"]:
        raise ModelError(
            f"{on_disk[0]} of {type(model).__name__} is offloaded to disk, where weights cannot be "
            f"changed: load the model with a device map of GPUs and cpu alone"
        )


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks of accelerate that move a module's own weights."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [one for one in hooks if isinstance(one, AlignDevicesHook)]
