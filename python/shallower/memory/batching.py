"""Texts in one forward without gradients: as many as a device has room for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PretrainedConfig

from ..models.architecture import evaluating
from ..models.decoder import Decoder
from ..models.identity import stored_dtype
from ..models.layer_config import heads_of
from ..texts.batches import Batch
from ..values.memory import MemoryPlan, usable
from ..values.tokens import DEFAULT_BATCH, Tokens
from .rehearsal import Rehearsal, build_empty, first_that_runs
from .sizes import dequantised_bytes, free_bytes, weight_bytes

MOST_TOKENS = 32_768
"""Tokens of a forward at most: more make no GPU faster."""

PARTS = ("weights", "activations")


@dataclass(frozen=True, slots=True)
class Forward:
    """A kind of forward, as it can be rehearsed.

    Attributes:
        run: does all that is done with a batch on the device of the model.
        beside: bytes of a text that the device holds beside its forward.
        on_cards: bytes that a forward takes on a GPU alone, where larger pieces are made at once.
    """

    run: Callable[[Decoder, Batch], object]
    beside: Callable[[Decoder, int], int] = lambda _decoder, _length: 0
    on_cards: Callable[[Decoder, int], int] = lambda _decoder, _tokens: 0


class ForwardStep:
    """A forward on a model without weights.

    Args:
        config: of the model.
        dtype: dtype of the weights.
        forward: the kind of forward.
        experts: the way that experts are run; None is the model's own.

    Attributes:
        model: the model.
        weights: bytes of its weights.
    """

    def __init__(
        self, config: PretrainedConfig, dtype: str, forward: Forward, *, experts: str | None
    ) -> None:
        plain = torch.bfloat16 if dtype in ("nf4", "int8") else getattr(torch, dtype)
        self.model = model = build_empty(config, plain, experts=experts)
        self.weights = weight_bytes(model, dtype)
        self._dequantised = dequantised_bytes(model, dtype)
        self._rehearsal, self._forward = Rehearsal(model), forward
        self._decoder = Decoder.of(model)
        self._seen: dict[tuple[int, int], int] = {}

    def live(self, texts: int, length: int, card: bool) -> int:
        """Count the bytes at the peak.

        Args:
            texts: texts in the forward.
            length: tokens of each.
            card: whether the device is a GPU, which takes more than a CPU at once.

        Returns:
            The bytes beside the weights.
        """
        key = texts, length
        if key not in self._seen:
            batch = Batch(
                np.zeros((texts, length), dtype=np.int64),
                np.ones((texts, length), dtype=np.int64),
                np.arange(texts),
            )

            def step() -> None:
                with ExitStack() as stack:
                    stack.enter_context(evaluating(self._decoder.model))
                    self._forward.run(self._decoder, batch)

            self._seen[key] = self._rehearsal.run(step)
        beside = texts * self._forward.beside(self._decoder, length)
        larger = self._forward.on_cards(self._decoder, texts * length) if card else 0
        return self._seen[key] + self._dequantised + beside + larger


def plan_forward(
    config: PretrainedConfig,
    dtype: str,
    forward: Forward,
    *,
    tokens: Tokens,
    device_bytes: int,
    card: bool,
    loaded: bool = False,
) -> MemoryPlan:
    """Choose the texts of a forward by what a device has room for.

    Args:
        config: of the model.
        dtype: dtype of the weights.
        forward: the kind of forward.
        tokens: the length of texts, and their number if it is given.
        device_bytes: free memory of the device.
        card: whether it is a GPU, which takes more than a CPU at once.
        loaded: whether the weights are on the device already, and not in what is free.

    Returns:
        The largest number that fits, or else one text; a plan without a peak where the model
        cannot be rehearsed.
    """
    sizes = list(_sizes(tokens, card))

    def rehearsed(experts: str | None) -> ForwardStep:
        step = ForwardStep(config, dtype, forward, experts=experts)
        step.live(1, tokens.max_length, card)
        return step

    step = first_that_runs(rehearsed)
    if step is None:
        return MemoryPlan(None, min(DEFAULT_BATCH, sizes[0]), None, device_bytes)
    weights = 0 if loaded else step.weights

    def plan(texts: int) -> MemoryPlan:
        sums = weights, step.live(texts, tokens.max_length, card)
        return MemoryPlan(sum(sums), texts, None, device_bytes, dict(zip(PARTS, sums, strict=True)))

    for texts in sizes:
        one = step.live(1, tokens.max_length, card)
        # From one text and two it is known what more will take, but for what is shared.
        estimate = weights + one
        if texts > 2:
            estimate += (texts - 1) * (step.live(2, tokens.max_length, card) - one)
        if 0.9 * estimate <= usable(device_bytes) and plan(texts).fits:
            return plan(texts)
    return plan(sizes[-1])


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
    """Decide how many texts make a forward of a model that is loaded.

    Args:
        decoder: the model.
        tokens: the length of texts and their number; one that is not ``auto`` stays.
        forward: the kind of forward.

    Returns:
        The same with a number: on a CPU 8, unless memory is short; on a GPU as many as fit, of
        32,768 tokens at most.
    """
    if tokens.batch_size != "auto":
        return tokens
    devices = {p.device for p in decoder.model.parameters() if not p.is_meta} | {decoder.device}
    cards = {device for device in devices if device.type == "cuda"}
    room = min(free_bytes(device) for device in cards or {torch.device("cpu")})
    if not cards and _plainly_fits(decoder, tokens.max_length, forward, room):
        return replace(tokens, batch_size=DEFAULT_BATCH)
    plan = plan_forward(
        decoder.model.config, stored_dtype(decoder.model), forward, tokens=tokens,
        device_bytes=room, card=bool(cards), loaded=True,
    )  # fmt: skip
    return replace(tokens, batch_size=plan.micro_batch)


def _plainly_fits(decoder: Decoder, length: int, forward: Forward, room: int) -> bool:
    """Whether an eighth of the room holds several copies of all that the linear maps of a layer
    take and give, of all scores, and of the logits that are made at once.
    """
    widths = max(
        sum(sum(weight.shape[-2:]) for weight in layer.parameters() if weight.ndim > 1)
        for layer in decoder.layers.modules
    )
    each = 12 * length * (widths + heads_of(decoder.config) * length) + forward.beside(
        decoder, length
    )
    return 8 * (DEFAULT_BATCH * each + (1 << 27)) < usable(room)
