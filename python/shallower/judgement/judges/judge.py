"""Judge: what a cut costs, by item; lower is better."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...models.head import Head
from ...models.layerwise import Layerwise
from ...texts.batches import Batch

FIRST_LOOK = 4
"""Items of the first look of a race; each look doubles them."""


class Judge(ABC):
    """What a cut is worth on the items of one split, measured from the final states of a forward.

    Attributes:
        name: as ``--judge`` names it.
        unit: of a mean score, as tables print it.
        batches: the items as token batches, in the order in which they are looked at.
        items: for every batch the indices of its items, ascending and consecutive: the first
            batch has the items ``0 .. a-1``, the next ``a .. b-1``.
        weights: (S,) float64, what each item counts.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    batches: Sequence[Batch]
    items: Sequence[NDArray[np.int64]]
    weights: NDArray[np.float64]

    @property
    def num_items(self) -> int:
        """S, the items."""
        return len(self.weights)

    def prepare(self, model: Layerwise, index: int, states: torch.Tensor) -> None:  # noqa: B027
        """Hear the final states of the whole model on a batch, before the first cut is judged.

        Args:
            model: the whole model.
            index: of the batch.
            states: (B, T, D), x^(L) on it.
        """

    @abstractmethod
    def measure(self, head: Head, index: int) -> NDArray[np.float64]:
        """Measure the items of a batch, while every forward of the model gives the cut's states.

        Args:
            head: of the model; its forward starts behind the layers
                (:meth:`Layerwise.starting_from`).
            index: of the batch.

        Returns:
            (items of the batch,) float64, the sum over each item.

        Raises:
            ModelError: a score is not finite.
        """


def looks(num_items: int, at_once: int) -> list[slice]:
    """Divide items into batches for a race: 4, 4, 8, 16, …, so that each look doubles them.

    Args:
        num_items: S.
        at_once: items of a batch at most.

    Returns:
        Consecutive ranges of items.
    """
    found, start, stop = [], 0, min(FIRST_LOOK, num_items)
    while start < num_items:
        for first in range(start, stop, at_once):
            found.append(slice(first, min(first + at_once, stop)))
        start, stop = stop, min(2 * stop, num_items)
    return found
