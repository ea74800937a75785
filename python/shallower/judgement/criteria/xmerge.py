"""The larger of two standard scores: a layer goes if it neither turns nor lengthens the states."""

import numpy as np
from numpy.typing import NDArray

from ...values.costs import Costs
from ..criterion import Criterion
from ..subject import Subject
from ..token_states import ALL_TOKENS, layer_changes


class XMerge(Criterion):
    """max(z(Block Influence), z(relative magnitude)), z a standard score over layers (2609.02083).

    A layer is cheap only if both say so. The deviation is that of the L layers, with divisor L;
    where all layers have one value, z is 0.
    """

    name = "xmerge"
    summary = "The larger of the standard scores of block_influence and magnitude over the layers."
    cost = "One pass over the texts, shared by block_influence, magnitude and xmerge; two states."

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`."""
        found = layer_changes(subject)
        total = found.tokens.sum()
        influence = 1 - found.cosines.sum(axis=1) / total
        magnitude = found.magnitudes.sum(axis=1) / total
        return Costs.of_layers(
            np.maximum(_standard(influence), _standard(magnitude)), metric=self.name,
            model=subject.decoder.identity, texts=subject.texts, positions=ALL_TOKENS,
        )  # fmt: skip


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = values.std()
    return (values - values.mean()) / (deviation if deviation else 1.0)
