"""The divergence from the uncut model's next-token distributions as a judge."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import CriterionError
from ...evaluation.loss import LOGITS_PER_CHUNK, logits_at, predicting_tokens
from ...memory.budget import BUDGET
from ...models.divergence import divergence_terms
from ...models.head import Head
from ...models.layerwise import Layerwise
from ...texts.batches import Batch
from .judge import Judge, require_finite


class KLJudge(Judge):
    """KL(p ‖ q), p the next-token distribution of the whole model and q that of the cut.

    Nats, summed over the tokens that the loss predicts from: all of a text but the last. Kept of
    the whole model are its states before the final norm, on the CPU, (B, T, D) of a batch in its
    dtype; logits of both are made of a few tokens at a time.

    Args:
        batches: of :func:`judged_batches`, texts of at least two tokens.
    """

    name = "kl"
    unit = "nats a token"

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.items = [batch.samples for batch in batches]
        self.weights = np.concatenate([predicting_tokens(b).sum(axis=1) for b in batches]) * 1.0
        self._whole: dict[int, tuple[Layerwise, torch.Tensor]] = {}

    def prepare(self, model: Layerwise, index: int, states: torch.Tensor) -> None:
        """Keep the states of the whole model, as :meth:`Judge.prepare`."""
        kept = torch.empty(states.shape, dtype=states.dtype)  # the caller's may be overwritten
        self._whole[index] = model, kept.copy_(states)
        BUDGET.hold(self, kept.nbytes)

    @torch.inference_mode()
    def measure(self, head: Head, index: int) -> NDArray[np.float64]:
        """Measure as :meth:`Judge.measure`."""
        if index not in self._whole:
            raise CriterionError(
                f"the judge kl compares with the whole model, whose states on batch {index} it "
                f"has not heard: call prepare before measure"
            )
        model, states = self._whole[index]
        batch = self.batches[index]
        predicting = predicting_tokens(batch)
        cut = logits_at(head, batch, predicting)
        first = [next(cut)]  # and with it the cut's final states, which the others are made of
        with model.starting_from(states, ()):
            parts = [
                divergences(*pair)
                for pair in zip(logits_at(head, batch, predicting), chain(first, cut), strict=True)
            ]
        of_texts = torch.cat(parts).split(predicting.sum(axis=1).tolist())
        sums = np.array(torch.stack([some.sum() for some in of_texts]).tolist())
        return require_finite(sums, self.items[index], head)


def divergences(whole: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Take KL(p ‖ q) of every row of logits.

    Args:
        whole: (R, V) logits of p, of any float dtype; one may be -inf.
        cut: (R, V) logits of q, on the same device.

    Returns:
        (R,) float64 nats, of float32 terms: within 2e-7 and a share of 1e-5, so that none is less
        than -2e-7.
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
