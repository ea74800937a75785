"""Trainings that go on with smaller forwards where the memory of a device does not hold them."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..errors import RecipeError
from ..memory.sizes import free_memory
from ..values.recipe import Resolved

Result = TypeVar("Result")


class Shrinking:
    """A training, begun again with a smaller forward when it runs out of memory.

    The sequences of a step and their mean do not depend on the size of a forward, so that the
    training goes on from its last checkpoint, or else from the adapters as they are now.

    Args:
        model: what is trained.
        recipe: the settings.
        automatic: names of the settings that may be changed, of ``batch_size`` and ``recompute``.
    """

    def __init__(self, model: Any, recipe: Resolved, automatic: Collection[str]) -> None:
        self._model, self._recipe, self._automatic = model, recipe, automatic
        self._begin = {
            name: weight.detach().to("cpu", copy=True)
            for name, weight in model.named_parameters()
            if automatic and weight.requires_grad
        }

    def run(self, train: Callable[[Resolved], Result]) -> Result:
        """Train, if need be several times.

        Args:
            train: trains by the settings, going on from the last checkpoint.

        Returns:
            What ``train`` gave.

        Raises:
            RecipeError: there is not enough memory, and nothing left that may be changed.
        """
        done: list[Result] = []
        while not done:
            smaller = None
            try:
                done.append(train(self._recipe))
            except torch.OutOfMemoryError as error:
                smaller = self._smaller()
                if smaller is None:
                    raise RecipeError(_advice(self._recipe)) from error
            if smaller is not None:  # and no error, whose traceback would hold the failed step
                self._begin_again(smaller)
        return done.pop()

    def _smaller(self) -> Resolved | None:
        recipe = self._recipe
        if recipe.batch_size > 1 and "batch_size" in self._automatic:
            return replace(recipe, batch_size=recipe.batch_size // 2)
        if not recipe.recompute and "recompute" in self._automatic:
            return replace(recipe, recompute=True)
        return None

    def _begin_again(self, recipe: Resolved) -> None:
        with torch.no_grad():
            for name, weight in self._model.named_parameters():
                if name in self._begin:
                    weight.grad = None
                    weight.copy_(self._begin[name])
        free_memory()
        changed = (
            f"with {recipe.batch_size} (batch_size, --batch-size)"
            if recipe.batch_size < self._recipe.batch_size
            else "with activations recomputed (recompute, --gradient-checkpointing)"
        )
        warnings.warn(
            f"there is not enough memory to train on {self._recipe.batch_size} sequences in one "
            f"forward: going on {changed}, from the last checkpoint",
            stacklevel=3,
        )
        self._recipe = recipe


def _advice(recipe: Resolved) -> str:
    ways = []
    if recipe.batch_size > 1:
        ways.append(f"--batch-size {recipe.batch_size // 2} (batch_size)")
    if not recipe.recompute:
        ways.append("--gradient-checkpointing (recompute)")
    if recipe.dtype != "nf4":
        ways.append("--dtype nf4 (dtype)")
    ways.append(f"a --max-length (max_length) of less than {recipe.max_length}")
    return f"there is not enough memory for the training: set {', or '.join(ways)}"
