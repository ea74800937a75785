"""Judges of cuts, item by item, by the loss of texts or by their divergence; lower is better."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ...errors import CriterionError, ModelError, TextsError
from ...evaluation.loss import LOGITS_PER_CHUNK, logits_at, predicting_tokens, summed_losses
from ...memory.budget import BUDGET
from ...models.head import Head, divergence_terms
from ...models.layerwise import Layerwise
from ...results.speech import Answer
from ...texts.batches import AnyTexts, Batch, TokenBatches, padded
from ...values.provenance import hash_of
from ...values.tokens import Tokens

FIRST_LOOK = 2
"""Items of the first look of a race; each look doubles them."""


class Judge(ABC):
    """What a cut is worth on the items of one split, measured from final states of a forward."""

    name: ClassVar[str]  # as in `--judge`
    unit: ClassVar[str] = "nats a token"  # of a mean score, in tables
    chance: float | None = None  # accuracy of a guess; None where nothing is right or wrong
    content: str = ""  # a hash of items that are unknown before a model is loaded
    batches: Sequence[Batch]  # of the items, in the order in which they are judged
    items: Sequence[NDArray[np.int64]]  # indices by batch, ascending; consecutive over batches
    weights: NDArray[np.float64]  # (S,) float64, what each item counts

    def __init__(self, batches: Sequence[Batch]) -> None:
        """Judge texts by what their tokens are predicted with; an item's are consecutive."""
        self.batches = batches
        self.items = [np.unique(batch.samples) for batch in batches]
        self.weights = np.empty(sum(map(len, self.items)))
        for index, items in enumerate(self.items):
            self.weights[items] = self.by_item(index, self.predicting(index).sum(axis=1) * 1.0)

    @property
    def num_items(self) -> int:
        """S, the items."""
        return len(self.weights)

    def prepare(self, model: Layerwise, index: int, states: torch.Tensor) -> None:  # noqa: B027
        """Take the whole model's final states on a batch, (B, T, D), before any cut is judged."""

    @abstractmethod
    def measure(self, head: Head, index: int) -> NDArray[np.float64]:
        """Measure the items of a batch: the sum over each in float64.

        Every forward of the model gives the cut's states; that of ``head`` starts behind the layers
        (:meth:`Layerwise.starting_from`). ModelError: a sum is not finite.
        """

    def accuracy(self, sums: NDArray[np.float64]) -> float | None:
        """The share of right items among those whose sums, (S,), are not NaN; None if none are."""
        return None

    def predicting(self, index: int) -> NDArray[np.bool_]:
        """(B, T), true at the tokens of a batch that others are predicted from."""
        return predicting_tokens(self.batches[index])

    def by_item(self, index: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum (B,) values of the texts of a batch over each of its items."""
        starts = np.searchsorted(self.batches[index].samples, self.items[index])
        sums: NDArray[np.float64] = np.add.reduceat(values, starts)
        return sums


class LossJudge(Judge):
    """The next-token loss: nats summed over the tokens of a text that are predicted."""

    name = "loss"

    def measure(self, head: Head, index: int) -> NDArray[np.float64]:
        nats = np.array(summed_losses(head, self.batches[index]).tolist())
        return require_finite(self.by_item(index, nats), self.items[index], head)


class KLJudge(Judge):
    """KL(p ‖ q), p the next-token distribution of the whole model and q that of the cut, in nats.

    It is summed over the predicted tokens. The whole model's states before the final norm, (B, T,
    D), are kept on the CPU, and logits are made of a few tokens at a time.
    """

    name = "kl"

    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__(batches)
        self._whole: dict[int, tuple[Layerwise, torch.Tensor]] = {}

    def prepare(self, model: Layerwise, index: int, states: torch.Tensor) -> None:
        kept = torch.empty(states.shape, dtype=states.dtype)  # the caller's may be overwritten
        self._whole[index] = model, kept.copy_(states)
        BUDGET.hold(self, kept.nbytes)

    @torch.inference_mode()
    def measure(self, head: Head, index: int) -> NDArray[np.float64]:
        if index not in self._whole:
            raise CriterionError(
                f"the judge {self.name} compares with the whole model, whose states on batch "
                f"{index} it was not given: call prepare before measure"
            )
        model, states = self._whole[index]
        batch, predicting = self.batches[index], self.predicting(index)
        cut = logits_at(head, batch, predicting)
        first = [next(cut)]  # and with it the cut's final states, which the others are made of
        with model.starting_from(states, ()):
            parts = [
                divergences(*pair)
                for pair in zip(logits_at(head, batch, predicting), chain(first, cut), strict=True)
            ]
        of_texts = torch.cat(parts).split(predicting.sum(axis=1).tolist())
        nats = np.array(torch.stack([some.sum() for some in of_texts]).tolist())
        return require_finite(self.by_item(index, nats), self.items[index], head)


def divergences(whole: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Take KL(p ‖ q) of every row of (R, V) float logits: (R,) float64 nats, of float32 terms.

    The error is within 2e-7 and a share of 1e-5; a logit of ``whole`` may be -inf.
    """
    rows = len(whole) if whole.is_cuda else max(1, LOGITS_PER_CHUNK // whole.shape[1])
    found = whole.new_empty(len(whole), dtype=torch.float64)
    pieces = whole.split(rows), cut.split(rows), found.split(rows)
    for of_whole, of_cut, sums in zip(*pieces, strict=True):
        terms, _, _ = divergence_terms(
            of_whole.float().log_softmax(-1), of_cut.float().log_softmax(-1)
        )
        sums.copy_(terms.sum(-1, dtype=torch.float64))
    return found


def judged_batches(
    tokenizer: PreTrainedTokenizerBase, texts: AnyTexts, tokens: Tokens
) -> list[Batch]:
    """Tokenise texts for a judge of whole texts, in their order, without those of one token."""
    found = list(TokenBatches(tokenizer, texts, tokens, min_tokens=2).token_ids())
    if not found:
        raise TextsError("no text that a cut could be judged on has two tokens")
    numbered = list(enumerate(found))
    return [padded(numbered[look]) for look in looks(len(found), tokens.texts)]


def require_finite(
    sums: NDArray[np.float64], items: NDArray[np.int64], head: Head
) -> NDArray[np.float64]:
    """Refuse scores by item, (B,), that are not finite; the ModelError names the first of them."""
    for item in items[~np.isfinite(sums)]:
        raise ModelError(
            f"the score of item {item} is not finite: the model's logits overflow or are NaN in "
            f"{head.dtype}; load it as bfloat16 or float32 (dtype, --dtype)"
        )
    return sums


def looks(num_items: int, at_once: int) -> list[slice]:
    """Divide items into consecutive batches of at most so many; looks end at 2, 4, 8, … items."""
    found, start, stop = [], 0, min(FIRST_LOOK, num_items)
    while start < num_items:
        for first in range(start, stop, at_once):
            found.append(slice(first, min(first + at_once, stop)))
        start, stop = stop, min(2 * stop, num_items)
    return found


class SpeechJudge(KLJudge):
    """KL(p ‖ q) on the whole model's answers, p its next-token distribution and q that of the cut.

    An item is a prompt with its answers in ``said``, weighted by their tokens.
    """

    name = "speech"

    def __init__(self, said: Sequence[Sequence[Answer]], *, tokens: Tokens) -> None:
        if not said:
            raise TextsError("there are no prompts that a cut could be judged on")
        batches = []
        for look in looks(len(said), max(1, tokens.texts // len(said[0]))):
            numbered = range(look.start, look.stop)
            rows = [(index, answer) for index in numbered for answer in said[index]]
            ids = [(index, np.array(one.ids, np.int64)) for index, one in rows]
            batches.append(padded(ids, np.array([len(one.given) for _, one in rows])))
        super().__init__(batches)
        self.content = hash_of([[astuple(one) for one in answers] for answers in said])
