"""Offloaded weights: on the CPU or on disk, and on the meta device except in their forward.

Accelerate's hooks bring them from a map of stored tensors; to change a weight, change that. Changed
weights of a model on disk are mapped from nameless files, which the system evicts under pressure.
"""

import ctypes
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import hooks as accelerate_hooks
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils.offload import OffloadedWeightsLoader
from torch import nn

from ..errors import raise_output_error
from ..values.counts import counted


def execution_device(module: nn.Module) -> torch.device | None:
    """Find the device that a hook brings a module's weights to; None where none moves them."""
    for hook in _hooks(module):
        if hook.offload and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether hooks bring weights of a module, or of a part of it, for a forward alone."""
    return any(hook.offload for part in module.modules() for hook in _hooks(part))


@dataclass(slots=True)
class Reading:
    """What was read of a model whose layers are streamed from disk."""

    of: int  # bytes of all of its layers, as they are stored
    bytes_read: int = 0  # of layers

    @property
    def passes(self) -> int:
        """As many passes over all layers as would read so much, a part of one counted whole."""
        return -(-self.bytes_read // self.of) if self.of else 0

    def to_json(self) -> dict[str, int]:
        """Give the counts as plain JSON values."""
        return {"passes": self.passes, "bytes_read": self.bytes_read}

    def __str__(self) -> str:
        passes = counted(self.passes, "pass", "passes")
        return f"read {self.bytes_read / 1e9:,.2f} GB of layers from disk, in {passes}"


_READINGS: "WeakKeyDictionary[nn.Module, Reading]" = WeakKeyDictionary()


def reading_of(model: nn.Module) -> Reading:
    """Give what was read of a model so far; later reads are counted there."""
    if model not in _READINGS:
        _READINGS[model] = Reading(stored_bytes(model))
    return _READINGS[model]


def is_on_disk(module: nn.Module) -> bool:
    """Whether weights of a module, or of a part of it, wait in files."""
    return next(_in_files(module), None) is not None


def stored_bytes(module: nn.Module) -> int:
    """Count the bytes of the weights of a module in files, as they are stored."""
    return sum(stop - start for _, start, stop in set(_in_files(module)))


def read_to_cpu(model: nn.Module) -> None:
    """Let weights be read from disk to the CPU; accelerate would read them to the GPU.

    From there they travel while the GPU computes, and there a changed one stays.
    """
    for part in model.modules():
        for hook in _hooks(part):
            loader = getattr(hook.weights_map, "dataset", None)
            if isinstance(loader, OffloadedWeightsLoader):
                loader.device = "cpu"


def fetch_ahead(module: nn.Module) -> None:
    """Let the system read the weights of a module from disk while other work goes on."""
    if not hasattr(os, "posix_fadvise"):  # not on Linux: they are read when they are needed
        return
    will_need(*changed_weights(module).values())
    for path, start, stop in _in_files(module, unchanged=True):
        with Path(path).open("rb") as file:
            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)


def will_need(*tensors: torch.Tensor) -> None:
    """Let the system read tensors of :func:`in_file` while other work goes on."""
    for tensor in tensors if hasattr(mmap, "MADV_WILLNEED") else ():
        place, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        ctypes.CDLL(None).madvise(place, size, mmap.MADV_WILLNEED)


def in_file(like: torch.Tensor) -> torch.Tensor:
    """Zeros of a tensor's shape and dtype in a temporary file; OutputError if there is no room."""
    with (
        raise_output_error(f"temporary files in {tempfile.gettempdir()} (TMPDIR)"),
        tempfile.NamedTemporaryFile(prefix="shallower-") as file,
    ):
        if hasattr(os, "posix_fallocate"):  # on Linux: a disk that is full is said here
            os.posix_fallocate(file.fileno(), 0, like.nbytes)
        whole = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
    return whole.view(like.shape)


def _in_files(module: nn.Module, unchanged: bool = False) -> Iterator[tuple[str, int, int]]:
    """The file and byte range of each weight on disk, of all or of the unchanged ones alone."""
    for part in module.modules():
        for hook in _hooks(part):
            stored = hook.weights_map
            loader: Any = getattr(stored, "dataset", None)
            for name, _ in part.named_parameters(recurse=False):
                key = f"{getattr(stored, 'prefix', '')}{name}"
                found = getattr(loader, "index", {}).get(key)
                if found is None or (unchanged and key in loader.state_dict):
                    continue
                yield from found.get("places", ())  # of a GGUF file
                if path := found.get("safetensors_file"):
                    yield path, *places_in(path)[found["weight_name"]]


def bring_from(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Let the hooks of a model bring what is streamed from disk from other stored weights."""
    for part in model.modules():
        for hook in _hooks(part):
            if hook.weights_map is not None:
                hook.weights_map.dataset = weights


@lru_cache(maxsize=256)
def places_in(path: str) -> dict[str, tuple[int, int]]:
    """Where the tensors of a file of safetensors begin and end, by name."""
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, 100 << 20)))
    header.pop("__metadata__", None)
    begin = 8 + size
    return {
        name: (begin + tensor["data_offsets"][0], begin + tensor["data_offsets"][1])
        for name, tensor in header.items()
    }


def stored_weight(module: nn.Module, name: str) -> torch.Tensor:
    """Find the tensor in which a weight is stored, which its hook brings it from if it has one.

    Of a weight on disk it is what was read now, unless :func:`write_weight` has changed it.
    """
    parameter: torch.Tensor = getattr(module, name)
    for hook in _hooks(module):
        if hook.weights_map is not None:
            with suppress(KeyError):  # to look for it first would read it twice
                return read_weight(hook, name).to(parameter.dtype)
    return parameter


def read_weight(hook: AlignDevicesHook, name: str) -> torch.Tensor:
    """Read the tensor that a hook brings a weight from, or raise KeyError; one thread at a time."""
    with _READING:
        stored: torch.Tensor = hook.weights_map[name]
        return stored


_READING = Lock()


class _InPart(Mapping[str, torch.Tensor]):
    """The stored weights of a module, of which one is brought in part."""

    def __init__(
        self, stored: Any, name: str, part: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.dataset, self.prefix = getattr(stored, "dataset", None), getattr(stored, "prefix", "")
        self._stored, self._name, self._part = stored, name, part

    def __getitem__(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._stored[name]
        return self._part(found) if name == self._name else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def bring_part(
    module: nn.Module, name: str, part: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], None]:
    """Let hooks bring a part of an offloaded weight; give what lets them bring all of it again."""
    with ExitStack() as undo:
        for hook in _hooks(module):
            if hook.weights_map is not None:
                undo.callback(setattr, hook, "weights_map", hook.weights_map)
                hook.weights_map = _InPart(hook.weights_map, name, part)
        return undo.pop_all().close


def write_weight(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Change a weight where it is stored and resident, by values of any dtype and device.

    Files stay: values in front of them lie :func:`in_file` until :func:`forget_change`.
    """
    live = getattr(module, name)
    for held, key in _in_front(module, name):
        if key not in held:
            held[key] = in_file(live)
    stored = stored_weight(module, name)
    stored.copy_(value)
    if live is not stored and not live.is_meta:
        live.copy_(value)
    _CHANGES[module] = changes_of(module) + 1


_CHANGES: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()


def changes_of(module: nn.Module) -> int:
    """How often weights of a module were changed; whoever has read them knows them no more."""
    return _CHANGES.get(module, 0)


def forget_change(module: nn.Module, name: str) -> None:
    """Let a weight on disk be read from its file again from here on."""
    live = getattr(module, name)
    for held, key in _in_front(module, name):
        if held.pop(key, None) is not None and not live.is_meta:
            live.copy_(stored_weight(module, name))
    _CHANGES[module] = changes_of(module) + 1


def copy_weight(module: nn.Module, name: str) -> torch.Tensor | None:
    """Copy a weight as it is, beside the card; None of one on disk that no change stands before."""
    held = [changed.get(key) for changed, key in _in_front(module, name)]
    if held and held[0] is not None:
        return in_file(held[0]).copy_(held[0])
    return None if held else stored_weight(module, name).detach().to("cpu", copy=True)


def changed_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Give the weights on disk of a module and its parts that were changed, by their names."""
    return {
        f"{path}.{name}".lstrip("."): held[key]
        for path, part in module.named_modules()
        for name, _ in part.named_parameters(recurse=False)
        for held, key in _in_front(part, name)
        if key in held
    }


def _in_front(module: nn.Module, name: str) -> Iterator[tuple[dict[str, torch.Tensor], str]]:
    """What is held in front of the file of a weight on disk, and its name there."""
    for hook in _hooks(module):
        stored = hook.weights_map
        loader: Any = getattr(stored, "dataset", None)
        key = f"{getattr(stored, 'prefix', '')}{name}"
        if key in getattr(loader, "index", {}):
            yield loader.state_dict, key


Brought = Mapping[AlignDevicesHook, Mapping[str, torch.Tensor]]
"""Weights that are on their device already, by the hook that would bring them, and by name."""


@contextmanager
def resident(module: nn.Module, brought: Brought = MappingProxyType({})) -> Iterator[None]:
    """Keep the offloaded weights of a module on its device for as long as the body runs."""
    with ExitStack() as stack:
        for part, hook in bringing(module):
            stack.enter_context(_held(part, hook, brought.get(hook)))
        yield


def run_resident(module: nn.Module) -> None:
    """Let all weights of a module be on its device in its forward, also those of its parts."""
    work = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with resident(module):
            return work(*args, **kwargs)

    module.forward = forward


@contextmanager
def _held(
    module: nn.Module, hook: AlignDevicesHook, brought: Mapping[str, torch.Tensor] | None
) -> Iterator[None]:
    if brought is None:
        hook.pre_forward(module)
    else:  # as the hook, which would empty torch's cache after each, and so wait for the device
        for name, value in brought.items():
            accelerate_hooks.set_module_tensor_to_device(
                module, name, value.device, value=value, clear_cache=False
            )
        hook.tied_pointers_to_remove = set()
    hook.offload = False
    try:
        yield
    finally:
        hook.offload = True
        hook.post_forward(module, None)


def bringing(module: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """List the parts of a module whose own weights a hook brings for a forward, and the hooks."""
    found = ((part, hook) for part in module.modules() for hook in _hooks(part))
    return [(part, hook) for part, hook in found if hook.offload]


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks of accelerate that move a module's own weights."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [one for one in hooks if isinstance(one, AlignDevicesHook)]
