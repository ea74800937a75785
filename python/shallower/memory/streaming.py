"""Streaming: a model whose layers are streamed from disk, run layer by layer over many batches.

Accelerate's hooks load a layer when it runs, and the next is fetched meanwhile. A pass reads each
layer once for as many batches as their states find room.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..models.architecture import find_layers
from ..models.decoder import Decoder
from ..models.gguf_reading import layer_bytes
from ..models.head import Head
from ..models.layerwise import Layerwise
from ..models.loading import layers_of
from ..models.offload import reading_of
from ..models.transfers import Gathered, HostCopies, is_apart
from ..texts.batches import Batch
from ..values.counts import counted
from ..values.estimates import format_size
from .budget import BUDGET
from .rehearsal import build_empty
from .weights import num_parameters

SAMPLE = 64 << 20
"""Bytes of a file by which the speed of a disk is measured."""

LEAST_KEPT = 64 << 20
"""Bytes of compared states that a pass may keep of any model."""

Pass = tuple[float, float]
"""How many passes over the layers there are, and the tokens of each."""

Look = Callable[[int, int, torch.Tensor], object]
"""Receives the place of a batch, the index of a state and its (B, T, D) values."""


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What streaming a model takes of the disk, at most."""

    passes: int  # over its layers
    bytes_read: int  # of layers
    states_bytes: int  # of a pass: of texts between two layers, and all compared
    seconds: float  # of reading, at the speed that this disk has now
    at_least: bool = False

    def to_json(self) -> dict[str, float]:
        """Give the fields as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{'at least ' * self.at_least}{counted(self.passes, 'pass', 'passes')} over the "
            f"layers, "
            f"{format_size(self.bytes_read)} from disk, about {self.seconds:,.0f} s of reading; "
            f"states of {format_size(self.states_bytes)} in a pass"
        )


def plan_stream(
    config: PretrainedConfig,
    files: Sequence[Path],
    dtype: torch.dtype,
    *,
    passes: Sequence[Pass],
    num_compared: float = 0,
) -> StreamPlan:
    """Plan passes over a model in files, on what is free now.

    Of ``num_compared`` tokens of a pass all states are kept.
    """
    if files[0].suffix == ".gguf":
        layers = layer_bytes(files[0], layers_of(config) or 0)
    else:
        layers = _layers_share(config, files, dtype)
    width = int(getattr(config.get_text_config(decoder=True), "hidden_size", 0))
    room, of_token = max(1, BUDGET.left // 2), width * dtype.itemsize
    kept = num_compared * of_token * ((layers_of(config) or 0) + 1)
    total, states = 0.0, 0.0
    for count, tokens in passes:
        size = tokens * of_token + kept
        each = max(1, math.ceil(size / room), math.ceil(kept / _most_kept(layers)))
        total, states = total + count * each, max(states, size / each)
    read = math.ceil(total) * layers
    return StreamPlan(math.ceil(total), read, round(states), read / disk_speed(files[0]))


def _most_kept(layers: int) -> int:
    """The bytes of compared states that a pass may keep, by the bytes of the layers on disk."""
    return max(LEAST_KEPT, layers // 4)


def _layers_share(config: PretrainedConfig, files: Sequence[Path], dtype: torch.dtype) -> int:
    """The bytes of files that are of layers, as far as all weights are stored alike."""
    model = build_empty(config, dtype)
    share = sum(num_parameters(layer) for layer in find_layers(model).modules)
    return round(sum(file.stat().st_size for file in files) * share / num_parameters(model))


def disk_speed(file: Path) -> float:
    """Measure how many bytes a second are read of a file that is not in memory."""
    size = min(SAMPLE, file.stat().st_size)
    with file.open("rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        while opened.tell() < size and opened.read(1 << 20):
            pass
        return size / max(1e-9, time.perf_counter() - begun)


class _Travelling:
    """(B, T, D) states of batches on the CPU, sent to a device and back; on CUDA meanwhile."""

    def __init__(self, device: torch.device, num_batches: int) -> None:
        self._device, self._copies = device, HostCopies()
        self._places = range(num_batches)
        self._there: dict[int, torch.Tensor] = {}
        self._leaving: tuple[int, Callable[[], torch.Tensor]] | None = None

    def __getitem__(self, place: int) -> torch.Tensor:
        if self._leaving and self._leaving[0] == place:
            self._settle()
        return self._there[place]

    def __setitem__(self, place: int, states: torch.Tensor) -> None:
        if not is_apart(states.device):
            self._there[place] = states.cpu()
            return
        self._settle()
        self._leaving = place, self._copies.start([Gathered(states[None], [0])])

    def on_device(self) -> Iterator[torch.Tensor]:
        """Give the states of each batch, where the model begins."""
        return self._copies.bring(map(self.__getitem__, self._places), self._device)

    def all(self) -> list[torch.Tensor]:
        """Give the states of all batches, on the CPU."""
        self._settle()
        return [self._there[place] for place in self._places]

    def _settle(self) -> None:
        """Wait for what leaves, and take it from the buffer, which another will need."""
        if self._leaving:
            place, wait = self._leaving
            self._there[place] = wait()[0].clone()
            self._leaving = None


class Streamed:
    """A model whose layers are each read once a pass over many batches.

    The states lie in the memory of the CPU, within a share of the process's budget; those that are
    compared also within a quarter of what the layers take on disk.
    """

    def __init__(self, model: Layerwise) -> None:
        self.model = model
        self._is_sure = model.check_joints()
        layers = reading_of(model.head.decoder.model).of
        self._room = BUDGET.share(self), _most_kept(layers)
        self._of_token = 0

    def groups(
        self, windows: Iterable[list[Batch]], compared: Callable[[Batch], int] = lambda _: 0
    ) -> Iterator[list[Batch]]:
        """Join windows of batches whose states find room together: the batches of one pass.

        All states are kept of so many tokens of a batch as are ``compared``. No window is read
        before those of the last pass were given away.
        """
        group: list[Batch] = []
        left = self._room
        for window in windows:
            size = self._bytes_of(window, compared)
            group, left = [*group, *window], (left[0] - size[0], left[1] - size[1])
            if left[0] < size[0] or left[1] < size[1]:  # of the next one, which is about as large
                yield group
                group, left = [], self._room
        if group:
            yield group

    def run(
        self,
        batches: Sequence[Batch],
        *,
        look: Look | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> list[torch.Tensor]:
        """Run all layers on batches, and give the (B, T, D) states behind them, on the CPU.

        ``look`` sees every state, from the embedding on; ``advance`` receives the texts of a batch
        that a layer has run on.
        """
        if not self._is_sure:
            self.model.check(batches[0].split(1)[0])
        layers = range(len(self.model))
        states = _Travelling(self.model.head.decoder.device, len(batches))
        for place, batch in enumerate(batches):
            states[place] = self.model.embed(batch)
        with self.model.evaluating():
            for layer in self.model.one_by_one(layers):
                for place, given in enumerate(states.on_device()):
                    if look is not None:
                        look(place, layer, states[place])
                    with self.model.alone():
                        reached = self.model.run(batches[place], given, (layer,))
                    states[place] = reached
                    del given, reached
                    advance(len(batches[place]))
        behind = states.all()
        if look is not None:
            for place, one in enumerate(behind):
                look(place, len(layers), one)
        return behind

    def _bytes_of(
        self, window: Sequence[Batch], compared: Callable[[Batch], int]
    ) -> tuple[int, int]:
        """The bytes of all states of a window that are held at once, and of those compared."""
        if not self._of_token and window:
            states = self.model.embed(window[0].split(1)[0])
            self._of_token = states.shape[-1] * states.element_size()
        kept = sum(map(compared, window)) * (len(self.model) + 1) * self._of_token
        return sum(batch.input_ids.size for batch in window) * self._of_token + kept, kept


class Forwards:
    """Whole forwards of a model; where layers are streamed, they start from final states."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._streamed = Streamed(Layerwise(decoder)) if decoder.is_streamed else None

    @cached_property
    def head(self) -> Head:
        """What makes logits of the final states."""
        return Head.of(self._decoder) if self._streamed is None else self._streamed.model.head

    def ready(
        self, windows: Iterable[list[Batch]], advance: Callable[[int], object] = lambda _: None
    ) -> Iterator[Batch]:
        """Give batches, each while a forward of the model on it gives its logits.

        ``advance`` receives the texts of a batch that is done, or that a streamed layer has run on.
        """
        if self._streamed is None:
            for batch in chain.from_iterable(windows):
                yield batch
                advance(len(batch))
            return
        for group in self._streamed.groups(windows):
            behind = self._streamed.run(group, advance=advance)
            for batch, states in zip(group, behind, strict=True):
                with self._streamed.model.starting_from(states, ()):
                    yield batch


def text_steps(decoder: Decoder) -> int:
    """The steps of a text on a bar: one, or as many as layers where each runs on its own."""
    return len(decoder) if decoder.is_streamed else 1


def look_at_states(model: Layerwise, batches: Sequence[Batch], look: Look) -> None:
    """Run a model layer by layer; ``look`` sees every state, by batch, or if streamed by layer."""
    if model.is_streamed:
        first, streamed = 0, Streamed(model)
        for group in streamed.groups([batch] for batch in batches):
            streamed.run(group, look=lambda place, *found, first=first: look(first + place, *found))
            first += len(group)
        return
    for place, batch in enumerate(batches):
        states = model.embed(batch)
        look(place, 0, states)
        for layer in range(len(model)):
            states = model.run(batch, states, (layer,))
            look(place, layer + 1, states)
