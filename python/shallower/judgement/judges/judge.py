"""Judge: what a cut costs, by item; lower is better."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ...errors import ModelError, TextsError
from ...models.head import Head
from ...models.layerwise import Layerwise
from ...texts.batches import Batch, TokenBatches, padded
from ...values.tokens import Tokens

FIRST_LOOK = 2
"""Items of the first look of a race; each look doubles them."""


class Judge(ABC):
    """What a cut is worth on the items of one split, measured from the final states of a forward.

    Attributes:
        name: as ``--judge`` names it.
        unit: of a mean score, as tables print it.
        chance: the accuracy of a guess; None where nothing is right or wrong.
        batches: the items as token batches, in the order in which they are looked at.
        items: for every batch the indices of its items, ascending and consecutive: the first
            batch has the items ``0 .. a-1``, the next ``a .. b-1``.
        weights: (S,) float64, what each item counts.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    chance: float | None = None
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

    def accuracy(self, sums: NDArray[np.float64]) -> float | None:
        """Tell the share of items that a cut gets right.

        Args:
            sums: (S,) of :meth:`measure`; an item that is NaN was not looked at.

        Returns:
            The share among those that were looked at; None where nothing is right or wrong.
        """
        return None


def judged_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], tokens: Tokens
) -> list[Batch]:
    """Tokenise texts for a judge of whole texts, in their order.

    Args:
        tokenizer: of the model.
        texts: any iterable of strings; those of fewer than two tokens are left out.
        tokens: the length of a text at most, and texts in one forward at most.

    Returns:
        The batches, looked at one after the other (:func:`looks`); texts are numbered in this
        order, without those that are left out.

    Raises:
        TextsError: no text has two tokens, or one is not a string.
    """
    found = list(TokenBatches(tokenizer, texts, tokens, min_tokens=2).token_ids())
    if not found:
        raise TextsError("no text that a cut could be judged on has two tokens")
    numbered = list(enumerate(found))
    return [padded(numbered[look]) for look in looks(len(found), tokens.texts)]


def require_finite(
    sums: NDArray[np.float64], items: NDArray[np.int64], head: Head
) -> NDArray[np.float64]:
    """Refuse scores that are not finite.

    Args:
        sums: (B,) over each item of a batch.
        items: (B,) their indices.
        head: that made them.

    Returns:
        The same scores.

    Raises:
        ModelError: a score is not finite; it names the first such item.
    """
    for item in items[~np.isfinite(sums)]:
        raise ModelError(
            f"the score of item {item} is not finite: the model's logits overflow or are NaN in "
            f"{head.dtype}; load it as bfloat16 or float32 (dtype, --dtype)"
        )
    return sums


def looks(num_items: int, at_once: int) -> list[slice]:
    """Divide items into batches for a race: 2, 2, 4, 8, …, so that each look doubles them.

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
