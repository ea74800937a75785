"""Healing without training: the layer before a cut is solved anew, in closed form.

The last matrix of that layer's feed-forward writes into the residual stream. It is found
again by least squares, so that the stream jumps to where the dropped layers would have taken it,
x^(stop) of the whole model. No parameter is added, and the checkpoint stays standard.

Three methods: ``refit`` solves the matrix itself, from its own inputs, and the matrices after
the cut as well, as long as the loss on held-out text falls; ``map`` puts a D×D map behind it
(ReplaceMe, 2505.02819); ``magnitude`` only closes the gap between the norms (Prune&Comp,
2507.18212).
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.memory import drop_layers
from ..errors import PatchError
from ..models.architecture import find_layers
from ..models.identity import identify
from ..models.layerwise import Layerwise
from ..values.layers import Layers, blocks_of, dropped_layers
from ..values.patch import Patch
from ..values.plan import Plan
from .patch_solver import Patching
from .patch_states import divide

METHODS = ("refit", "map", "magnitude")


def patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Layers,
    texts: Iterable[str],
    method: str = "refit",
    max_length: int = 256,
    batch_size: int = 16,
    num_tokens: int = 131_072,
    progress: bool | None = None,
) -> Patch:
    """Drop layers and heal the cut in closed form, in place.

    Args:
        model: the whole model, in float32, bfloat16 or float16.
        tokenizer: its tokenizer.
        layers: blocks, ranges or indices to drop, 0-based.
        texts: calibration texts, as for :func:`shallower.scan`; every eighth is held out, to
            choose by and to report on.
        method: ``refit`` (the default), ``map`` or ``magnitude``.
        max_length: tokens of a text at most.
        batch_size: texts in one forward.
        num_tokens: tokens to fit, at most; layers after the cut take half of them. Their
            states lie in a temporary file: twice ``num_tokens`` times D values. Memory grows
            with the widths alone.
        progress: a bar on standard error; by default if that is a terminal.

    Returns:
        What was done and what it is worth.

    Raises:
        PatchError: the loss on held-out text would not fall; there is no layer before a
            block; a layer does not write by a plain linear map (mixtures of experts, norms
            behind the feed-forward, quantised weights). The model is then as it was.
        TextsError: there are too few texts.
        LayersError, ModelError: as :func:`shallower.drop_layers`.
    """
    if method not in METHODS:
        raise PatchError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if num_tokens < 1:
        raise PatchError(f"num_tokens = {num_tokens}: expected at least 1")
    found = find_layers(model)
    plan = Plan(len(found), blocks_of(dropped_layers(len(found), layers)), model=identify(model))
    if plan.blocks[0].start == 0 and method != "magnitude":
        raise PatchError(
            f"there is no layer before the block {plan.blocks[0]} that could be solved anew: "
            f"drop later layers, or use the method magnitude"
        )
    fitted, held_out = divide(tokenizer, texts, max_length, batch_size, num_tokens)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        undo = stack.enter_context(_restoring())
        work = stack.enter_context(
            Patching(Layerwise(model), plan, fitted, held_out, undo, progress)
        )
        done = work.magnitude() if method == "magnitude" else work.solve(method)
        if not done.patched < done.cut:
            raise PatchError(
                f"the patch does not help: the loss on {done.num_held_out} held-out tokens is "
                f"{done.patched:.4f} nats with it and {done.cut:.4f} without, of "
                f"{done.original:.4f} before the cut; give more texts, or another method"
            )
        drop_layers(model, plan.blocks)
        undo.clear()
    return done


@contextmanager
def _restoring() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Weights and what they were: put back at the end, unless the list is emptied."""
    changed: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        yield changed
    finally:
        for weight, before in reversed(changed):
            weight.copy_(before)
