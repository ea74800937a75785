"""Healing in minutes: the layer before a cut is solved anew, in closed form, and moves on.

The last matrix of that layer's feed-forward writes into the residual stream. It is found
again by least squares, so that the stream jumps to where the dropped layers would have taken it,
x^(stop) of the whole model. No parameter is added, and the checkpoint stays standard.

Three methods: ``refit`` solves the matrix itself, from its own inputs; then all matrices from there
on take a few steps towards the whole model's next words. ``map`` puts a D×D map
behind it (ReplaceMe, 2505.02819); ``magnitude`` only closes the gap between the norms
(Prune&Comp, 2507.18212).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.in_model import drop_layers, without_layers
from ..errors import PatchError
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..models.offload import require_no_disk
from ..values.layers import Layers
from ..values.patch import Patch
from ..values.plan import Plan
from .changes import Changes
from .solver import Patching
from .states import divide

METHODS = ("refit", "map", "magnitude")

NUM_TOKENS, CPU_TOKENS = 131_072, 32_768
"""Tokens to fit by default, at most, on a GPU and on a CPU."""


def patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Plan | Layers,
    *,
    texts: Iterable[str],
    method: str = "refit",
    max_length: int = 256,
    batch_size: int = 16,
    num_tokens: int | None = None,
    progress: bool | None = None,
) -> Patch:
    """Drop layers and heal the cut in minutes, in place.

    Args:
        model: the whole model, in float32, bfloat16 or float16.
        tokenizer: its tokenizer.
        layers: a plan, whose score, metric, texts and strategy are kept; or blocks, ranges or
            indices to drop, 0-based.
        texts: calibration texts, read once; every eighth is held out, to choose by and to
            report on.
        method: ``refit``, ``map`` or ``magnitude``.
        max_length: tokens of a text at most.
        batch_size: texts in one forward.
        num_tokens: tokens to fit, at most; by default 131,072, on a CPU 32,768. Their states lie
            in temporary files: at most three times ``num_tokens`` times D values. For ``refit`` the
            matrices that move are held four times in the memory of the CPU, and a model on the CPU
            takes up to a quarter of what is free for the graphs of its layers.
        progress: whether to show a bar on standard error; by default if that is a terminal.

    Returns:
        The plan that was carried out, the layers that were solved anew, and the losses in nats
        a token of the whole model, the cut and the patched cut on the held-out texts.

    Raises:
        PatchError: the loss on held-out text would not fall; there is no layer before a
            block; a layer does not write by a plain linear map (mixtures of experts, norms
            behind the feed-forward, quantised weights); there is not enough memory. The model
            is then as it was.
        TextsError: there are too few texts.
        PlanError: the plan is for another model.
        LayersError, ModelError: as :func:`shallower.drop_layers`.

    Example:
        >>> plan = scan.plan(8)
        >>> done = sh.patch(model, tokenizer, plan, texts=texts)
        >>> done.patched < done.cut
        True
        >>> sh.save_patched(model, tokenizer, "patched", done=done)
    """
    options = method, max_length, batch_size, num_tokens, progress
    with _solved(model, tokenizer, layers, texts, *options) as (done, changes):
        # By number: blocks that a scan chose know its model, whose biases may have been scaled.
        drop_layers(model, done.plan.dropped)
        changes.settle()
    return done


@contextmanager
def with_patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Plan | Layers,
    *,
    texts: Iterable[str],
    max_length: int = 256,
    num_tokens: int | None = None,
    progress: bool | None = None,
) -> Iterator[Patch]:
    """Patch a model by ``refit`` for as long as the body runs; it is as before afterwards.

    Args:
        model: the whole model.
        tokenizer: its tokenizer.
        layers: as for :func:`patch`.
        texts: as for :func:`patch`.
        max_length: tokens of a text at most.
        num_tokens: as for :func:`patch`.
        progress: whether to show a bar on standard error.

    Yields:
        The same as :func:`patch` returns.

    Raises:
        PatchError, TextsError, PlanError, LayersError, ModelError: as :func:`patch`.
    """
    options = "refit", max_length, 16, num_tokens, progress
    with (
        _solved(model, tokenizer, layers, texts, *options) as (done, _),
        without_layers(model, done.plan.blocks),
    ):
        yield done


@contextmanager
def _solved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Plan | Layers,
    texts: Iterable[str],
    method: str,
    max_length: int,
    batch_size: int,
    num_tokens: int | None,
    progress: bool | None,
) -> Iterator[tuple[Patch, Changes]]:
    """Solve the matrices of a model that still has all of its layers.

    Yields the patch, and the weights that changed: what is not settled by the body is put back.
    """
    if method not in METHODS:
        raise PatchError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if num_tokens is not None and num_tokens < 1:
        raise PatchError(f"num_tokens = {num_tokens}: expected at least 1")
    require_no_disk(model)
    decoder = Decoder.of(model)
    plan = Plan.of(len(decoder), layers)
    plan.check_model(decoder.identity)
    plan = replace(plan, model=decoder.identity)
    if plan.blocks[0].start == 0 and method != "magnitude":
        raise PatchError(
            f"there is no layer before the block {plan.blocks[0]} that could be solved anew: "
            f"drop later layers, or use the method magnitude"
        )
    fitted, held_out = divide(
        tokenizer, texts, max_length=max_length, batch_size=batch_size,
        num_tokens=num_tokens or (CPU_TOKENS if decoder.device.type == "cpu" else NUM_TOKENS),
    )  # fmt: skip
    changes = Changes()
    try:
        try:
            with torch.no_grad(), Patching(
                Layerwise(model), plan, fitted, held_out, changes, progress
            ) as work:  # fmt: skip
                done = work.magnitude() if method == "magnitude" else work.solve(method)
        except torch.OutOfMemoryError as error:
            raise PatchError(
                f"there is not enough memory to patch with {batch_size} texts of at most "
                f"{max_length} tokens in one forward: lower batch_size (--batch-size), or let "
                f"layers wait in the memory of the CPU (device_map, --device-map)"
            ) from error
        if not done.patched < done.cut:
            raise PatchError(
                f"the patch does not help: the loss on {done.num_held_out} held-out tokens is "
                f"{done.patched:.4f} nats with it and {done.cut:.4f} without, of "
                f"{done.original:.4f} before the cut; give more texts, or another method"
            )
        yield done, changes
    finally:
        changes.take_back()
