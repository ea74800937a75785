"""How many texts of a forward, and what recomputation, fit into memory (:func:`fitting`).

:func:`plan_step` is the one search for the choice that fits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from ..models.architecture import evaluating
from ..models.decoder import Decoder
from ..models.dtypes import plain_dtype
from ..models.identity import stored_dtype
from ..models.layer_config import heads_of
from ..models.offload import is_offloaded
from ..texts.batches import Batch
from ..values.estimates import OFFLOADED, MemoryPlan, usable
from ..values.tokens import DEFAULT_BATCH, Tokens
from .budget import BUDGET
from .device import Room, available_bytes
from .rehearsal import Rehearsal, build_empty, first_that_runs
from .weights import dequantised_bytes, module_bytes, weight_parts

MOST_TOKENS = 32_768
"""Tokens of a forward at most: more make no GPU faster."""

Choice = tuple[int, bool | None]
"""Texts in one forward, and whether activations are recomputed; None without a backward."""


Parts = Callable[[int, bool | None], dict[str, int]]
"""Give the bytes of a choice at the peak, by what they are for; of ``OFFLOADED`` elsewhere."""


def plan_step(parts: Parts | None, choices: Sequence[Choice], device_bytes: int) -> MemoryPlan:
    """Choose the first (fastest) choice that fits, or else the last; without parts the first."""
    if parts is None:
        return MemoryPlan(None, *choices[0], device_bytes)
    several = len({texts for texts, _ in choices}) > 1
    for choice in choices:
        if several and not _may_fit(parts, choice, device_bytes):
            continue
        if (plan := _plan_of(parts, choice, device_bytes)).fits:
            return plan
    return _plan_of(parts, choices[-1], device_bytes)


def _plan_of(parts: Parts, choice: Choice, device_bytes: int) -> MemoryPlan:
    return MemoryPlan(peak_of(parts, choice), *choice, device_bytes, parts(*choice))


def peak_of(parts: Parts, choice: Choice) -> int:
    """The bytes of a device that a step holds at once."""
    return sum(size for name, size in parts(*choice).items() if name != OFFLOADED)


def _may_fit(parts: Parts, choice: Choice, device_bytes: int) -> bool:
    """Whether one text fits, which is quickly rehearsed, and more are not far from it."""
    texts, recompute = choice
    one, room = peak_of(parts, (1, recompute)), usable(device_bytes)
    few = texts <= 2 or texts * one <= room  # no text takes more than the first
    return one <= room and (few or 0.9 * estimate(parts, choice) <= room)


def estimate(parts: Parts, choice: Choice) -> int:
    """The bytes at the peak, if every text takes as many more as the second does."""
    texts, recompute = choice
    one, two = (peak_of(parts, (few, recompute)) for few in (1, 2))
    return one + (texts - 1) * (two - one)


def plainly_fits(
    *, widths: int, scores: int, texts: int, length: int, fixed: int, room: int
) -> bool:
    """Show quickly that a small model fits; a rehearsal takes longer, and False says nothing.

    True if an eighth of the room holds what is ``fixed`` and several copies of all that linear
    maps take and give (``widths`` values a token) and of all scores of attention.
    """
    live = 12 * texts * length * (widths + scores * length)
    return 8 * (live + fixed) < usable(room)


@dataclass(frozen=True, slots=True)
class Forward:
    """A kind of forward, as it can be rehearsed."""

    # All that is done with a batch on the device of the model.
    run: Callable[[Decoder, Batch], object]
    # Bytes of a text of a length beside its forward.
    beside: Callable[[Decoder, int], int] = lambda _decoder, _length: 0
    # Bytes of so many tokens on a GPU alone, which makes larger pieces.
    on_cards: Callable[[Decoder, int], int] = lambda _decoder, _tokens: 0


class ForwardStep:
    """A forward of texts of one length, without gradients, on a model without weights.

    Where the weights are ``loaded``, they are on the device already, and not in what is free.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: str,
        forward: Forward,
        *,
        length: int,
        card: bool,
        loaded: bool = False,
        experts: str | None = None,
    ) -> None:
        self.model = model = build_empty(config, plain_dtype(dtype), experts=experts)
        self.weights = {"weights": 0} if loaded else weight_parts(model, dtype)
        self._dequantised = dequantised_bytes(model, dtype)
        self._rehearsal, self._forward = Rehearsal(model), forward
        self._decoder = Decoder.of(model)
        self._length, self._card = length, card
        self._seen: dict[int, int] = {}

    def parts(self, texts: int, recompute: bool | None = None) -> dict[str, int]:
        """Count the bytes as :data:`Parts`."""
        return {**self.weights, "activations": self._live(texts)}

    def _live(self, texts: int) -> int:
        """The bytes at the peak beside the weights."""
        if texts not in self._seen:
            self._seen[texts] = self._rehearsed(texts)
        beside = texts * self._forward.beside(self._decoder, self._length)
        tokens = texts * self._length
        larger = self._forward.on_cards(self._decoder, tokens) if self._card else 0
        return self._seen[texts] + self._dequantised + beside + larger

    def _rehearsed(self, texts: int) -> int:
        batch = Batch(
            np.zeros((texts, self._length), dtype=np.int64),
            np.ones((texts, self._length), dtype=np.int64),
            np.arange(texts),
        )

        def step() -> None:
            with evaluating(self._decoder.model):
                self._forward.run(self._decoder, batch)

        return self._rehearsal.run(step)


def plan_forward(
    config: PretrainedConfig,
    dtype: str,
    forward: Forward,
    *,
    tokens: Tokens,
    room: Room,
    loaded: bool = False,
) -> MemoryPlan:
    """Choose the texts of a forward by what a device has room for, or one text where none fits."""
    of_room: Any = {"length": tokens.max_length, "card": room.card, "loaded": loaded}

    def rehearsed(experts: str | None) -> ForwardStep:
        step = ForwardStep(config, dtype, forward, **of_room, experts=experts)
        step.parts(1)
        return step

    step = first_that_runs(rehearsed)
    choices: list[Choice] = [(texts, None) for texts in _sizes(tokens, room.card)]
    if step is None and tokens.batch_size == "auto":
        choices = [choice for choice in choices if choice[0] <= DEFAULT_BATCH]
    return plan_step(None if step is None else step.parts, choices, room.size)


def _sizes(tokens: Tokens, card: bool) -> Iterator[int]:
    """Numbers of texts from the largest on."""
    if tokens.batch_size != "auto":
        yield tokens.batch_size
        return
    texts = DEFAULT_BATCH
    if card:
        most = max(1, MOST_TOKENS // tokens.max_length)
        texts = 1 << (most.bit_length() - 1)
    while texts:
        yield texts
        texts //= 2


def fitting(decoder: Decoder, tokens: Tokens, forward: Forward) -> Tokens:
    """Decide how many texts make a forward of a loaded model, where that is ``auto``.

    On a CPU 8, if memory allows; on a GPU what fits, beside two layers where they come there only
    to run, of 32,768 tokens at most.
    """
    if tokens.batch_size != "auto":
        return tokens
    devices = {p.device for p in decoder.model.parameters() if not p.is_meta} | {decoder.device}
    cards = {device for device in devices if device.type == "cuda"}
    free = min(available_bytes(device) for device in cards or {torch.device("cpu")})
    room = Room(free if BUDGET.bound is None else min(free, BUDGET.bound), bool(cards))
    if room.card and (layers := list(filter(is_offloaded, decoder.layers.modules))):
        room = Room(max(0, room.size - 2 * max(map(module_bytes, layers))), card=True)
        forward = _travelling(forward) if decoder.is_streamed else forward
    if not room.card and _plainly_fits(decoder, tokens.max_length, forward, room.size):
        return replace(tokens, batch_size=DEFAULT_BATCH)
    plan = plan_forward(
        decoder.model.config,
        stored_dtype(decoder.model),
        forward,
        tokens=tokens,
        room=room,
        loaded=True,
    )
    return replace(tokens, batch_size=plan.micro_batch)


def _travelling(forward: Forward) -> Forward:
    """A forward beside which states come and leave, those of three batches at once."""

    def beside(decoder: Decoder, length: int) -> int:
        width = int(getattr(decoder.config, "hidden_size", 0))
        return 3 * length * width * decoder.model.dtype.itemsize

    return replace(forward, beside=beside)


def _plainly_fits(decoder: Decoder, length: int, forward: Forward, room: int) -> bool:
    """Whether the widest layer fits plainly, beside the logits that are made at once."""
    widths = max(
        sum(sum(weight.shape[-2:]) for weight in layer.parameters() if weight.ndim > 1)
        for layer in decoder.layers.modules
    )
    return plainly_fits(
        widths=widths,
        scores=heads_of(decoder.config),
        texts=DEFAULT_BATCH,
        length=length,
        fixed=DEFAULT_BATCH * forward.beside(decoder, length) + (1 << 27),
        room=room,
    )
