"""The next-token loss as a judge."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...evaluation.loss import predicting_tokens, summed_losses
from ...models.head import Head
from ...texts.batches import Batch
from .judge import Judge, require_finite


class LossJudge(Judge):
    """The next-token loss: nats summed over the tokens of a text but the first.

    Args:
        batches: of :func:`judged_batches`, texts of at least two tokens.
    """

    name = "loss"
    unit = "nats a token"

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.items = [batch.samples for batch in batches]
        self.weights = np.concatenate([predicting_tokens(b).sum(axis=1) for b in batches]) * 1.0

    def measure(self, head: Head, index: int) -> NDArray[np.float64]:
        """Measure as :meth:`Judge.measure`."""
        sums = np.array(summed_losses(head, self.batches[index]).tolist())
        return require_finite(sums, self.items[index], head)
