"""The next-token loss as a judge."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelError
from ...evaluation.loss import summed_losses
from ...models.head import Head
from ...texts.batches import Batch
from .judge import Judge


class LossJudge(Judge):
    """The next-token loss: nats summed over the tokens of a text but the first.

    Args:
        batches: texts of at least two tokens, numbered in the order of the batches.
    """

    name = "loss"
    unit = "nats a token"

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.items = [batch.samples for batch in batches]
        self.weights = np.concatenate([b.attention_mask.sum(axis=1) - 1.0 for b in batches])

    def measure(self, head: Head, index: int) -> NDArray[np.float64]:
        """Measure as :meth:`Judge.measure`."""
        sums: NDArray[np.float64] = summed_losses(head, self.batches[index]).cpu().numpy()
        if not np.isfinite(sums).all():
            raise ModelError("a loss is not finite: load the model as bfloat16 or float32")
        return sums
