"""The layer that runs next, on its way to the device while the one before it computes.

On CUDA a thread sends it from pinned memory on its own stream, so two layers lie there. Elsewhere
the system is advised to read the files ahead.

The memory belongs to the computing stream. A copy begins when all work queued before the allocation
is done, and computing begins after the copy's event. Unused prefetches are synchronised before
their memory is freed. So ``record_stream``, which would depend on timing, is not needed. On fake
devices a timeline of vector clocks (``tests/devices/timeline.py``) refuses any work that begins too
early.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn

from .offload import (
    Brought,
    bringing,
    changes_of,
    execution_device,
    fetch_ahead,
    read_weight,
    resident,
)
from .transfers import SideStreams, Upload, is_apart


@dataclass(slots=True)
class _Coming:
    """Weights of a module that a thread brings, unless they are wanted no more."""

    module: nn.Module
    weights: Brought
    changes: int
    upload: Upload
    is_wanted: bool = True
    read: Future[None] = field(default_factory=Future)

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each weight, read now, and where it goes."""
        for hook, targets in self.weights.items():
            for name, target in targets.items():
                if not self.is_wanted:
                    return
                yield read_weight(hook, name).to("cpu", target.dtype), target

    def is_for(self, module: nn.Module) -> bool:
        """Whether these are all weights of a module, as they are stored now."""
        return (
            self.module is module
            and self.read.exception() is None
            and self.changes == _changes_in(module)
        )


class Ahead:
    """The weights of one layer, on their way to a device."""

    def __init__(self, streams: SideStreams | None = None) -> None:
        self._streams = streams or SideStreams()
        self._thread = ThreadPoolExecutor(1, "shallower-weights")
        self._coming: _Coming | None = None
        self._has_room = True

    def fetch(self, module: nn.Module) -> None:
        """Fetch the weights of the module that is needed next, while other work goes on."""
        fetch_ahead(module)
        self.drop()
        device = next(filter(None, map(execution_device, module.modules())), None)
        if device is None or not is_apart(device) or not self._has_room:
            return
        try:
            weights = _allocate(module, device)
        except torch.OutOfMemoryError:  # it is brought when it is needed
            self._has_room = False
            return
        upload = self._streams.begin(device)
        coming = _Coming(module, weights, _changes_in(module), upload)
        coming.read = self._thread.submit(self._streams.bring, upload, coming.pairs())
        self._coming = coming

    def resident(self, module: nn.Module) -> AbstractContextManager[None]:
        """Keep a module's weights on its device in the body; computing begins after them."""
        coming = self._take()
        return resident(module, coming.weights if coming and coming.is_for(module) else {})

    def drop(self) -> None:
        """Let go of what was fetched and is not needed."""
        if self._coming is not None:
            self._coming.is_wanted = False
            self._take()

    def give_way(self) -> bool:
        """Free the memory that the next layer takes, from here on; whether it took any."""
        self._has_room, is_there = False, self._coming is not None
        self.drop()
        return is_there

    def _take(self) -> _Coming | None:
        """Take what was fetched; its memory is in use until here, whatever becomes of it."""
        if (coming := self._coming) is not None:
            wait([coming.read])
            self._streams.arrive(coming.upload)
            self._coming = None
        return coming


def _allocate(module: nn.Module, device: torch.device) -> Brought:
    """Memory on a device for the plain weights of a module; its hooks bring all others."""
    with torch.inference_mode(False):
        return {
            hook: {
                name: torch.empty_like(weight, device=device, requires_grad=False)
                for name, weight in part.named_parameters(recurse=False)
            }
            for part, hook in bringing(module)
            if execution_device(part) == device and _is_plain(part, hook)
        }


def _is_plain(part: nn.Module, hook: AlignDevicesHook) -> bool:
    """Whether all that a hook brings are tensors of numbers, as they are stored, in one module."""
    return not (hook.offload_buffers or hook.place_submodules) and all(
        weight.is_floating_point() and not hasattr(weight, "__tensor_flatten__")
        for weight in part.parameters(recurse=False)
    )


def _changes_in(module: nn.Module) -> int:
    return sum(map(changes_of, module.modules()))
