"""Fewer texts a forward after memory ran out, and the error where one text is too many."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from ..errors import ModelError, RecipeError
from ..settings.recipe import Resolved
from ..texts.batches import Batch
from .device import free_memory

Result = TypeVar("Result")


def _attempt(work: Callable[[], Result], refusal: Exception | None) -> list[Result]:
    """Do work, and give its result in a list, which is empty if there was too little memory.

    Where nothing smaller is left, ``refusal`` is raised. The error does not leave this function,
    since its traceback would hold the tensors of what failed.
    """
    try:
        return [work()]
    except torch.OutOfMemoryError as error:
        if refusal is not None:
            raise refusal from error
    return []


class Halving:
    """Forwards of batches in parts of a size that fits; results differ by rounding alone."""

    def __init__(self) -> None:
        self._texts: int | None = None

    def run(
        self, batch: Batch, forward: Callable[[Batch], Result]
    ) -> Iterator[tuple[Batch, Result]]:
        """Run a batch in parts, with results in order; ``forward`` leaves nothing if it fails."""
        waiting = [batch]
        while waiting:
            part, *rest = waiting.pop().split(self._texts or len(batch))
            waiting += rest[::-1]
            refusal = _too_long(part) if len(part) == 1 else None
            if done := _attempt(partial(forward, part), refusal):
                yield part, done.pop()
            else:
                self._shrink(len(part))
                waiting.append(part)

    def _shrink(self, texts: int) -> None:
        """Go on with half of the texts that were too many."""
        self._texts = (texts + 1) // 2
        free_memory()  # GPU blocks are in pieces of the wrong sizes
        warnings.warn(
            f"there is not enough memory for {texts} texts in one forward: going on with "
            f"{self._texts} (batch_size, --batch-size)",
            stacklevel=2,
        )


def _too_long(batch: Batch) -> ModelError:
    return ModelError(
        f"there is not enough memory for the forward of one text of {batch.input_ids.shape[1]} "
        f"tokens: shorten texts (max_length, --max-length), stream the layers from disk "
        f"(device_map, --stream), quantise the weights (dtype, --dtype nf4), or spread them over "
        f"more devices (device_map, --device-map)",
        see="streaming",
    )


def train_within(
    model: Any,
    recipe: Resolved,
    train: Callable[[Resolved], Result],
    *,
    automatic: Collection[str],
) -> Result:
    """Train, again with a smaller forward when memory runs out; RecipeError where nothing is left.

    The sequences of a step and their mean do not depend on the size of a forward. So the training
    resumes from its last checkpoint, or else from the adapters as they are now. ``automatic`` names
    the settings that may be changed.
    """
    begin = {
        name: weight.detach().to("cpu", copy=True)
        for name, weight in model.named_parameters()
        if automatic and weight.requires_grad
    }
    while True:
        smaller = _smaller(recipe, automatic)
        refusal = _advice(recipe) if smaller is None else None
        if done := _attempt(partial(train, recipe), refusal):
            return done.pop()
        assert smaller is not None
        _put_back(model, begin)
        changed = (
            f"with {smaller.batch_size} (batch_size, --batch-size)"
            if smaller.batch_size < recipe.batch_size
            else "with activations recomputed (recompute, --gradient-checkpointing)"
        )
        warnings.warn(
            f"there is not enough memory to train on {recipe.batch_size} sequences in one "
            f"forward: going on {changed}, from the last checkpoint",
            stacklevel=2,
        )
        recipe = smaller


def _smaller(recipe: Resolved, automatic: Collection[str]) -> Resolved | None:
    if recipe.batch_size > 1 and "batch_size" in automatic:
        return replace(recipe, batch_size=recipe.batch_size // 2)
    if not recipe.recompute and "recompute" in automatic:
        return replace(recipe, recompute=True)
    return None


@torch.no_grad()
def _put_back(model: Any, begin: Mapping[str, torch.Tensor]) -> None:
    for name, weight in model.named_parameters():
        if name in begin:
            weight.grad = None
            weight.copy_(begin[name])
    free_memory()


def _advice(recipe: Resolved) -> RecipeError:
    ways = []
    if recipe.batch_size > 1:
        ways.append(f"--batch-size {recipe.batch_size // 2} (batch_size)")
    if not recipe.recompute:
        ways.append("--gradient-checkpointing (recompute)")
    if recipe.dtype != "nf4":
        ways.append("--dtype nf4 (dtype)")
    ways.append(f"a --max-length (max_length) of less than {recipe.max_length}")
    return RecipeError(
        f"there is not enough memory for the training: set {', or '.join(ways)}", see="healing"
    )
