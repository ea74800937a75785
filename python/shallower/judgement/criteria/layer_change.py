"""Criteria of single layers: what a layer changes in the states of all tokens."""

import numpy as np
from numpy.typing import NDArray

from ...values.costs import Costs
from ..criterion import Criterion
from ..subject import Subject
from ..token_states import ALL_TOKENS, layer_changes, layer_costs


class LayerChange(Criterion):
    """A criterion of one shared pass over all tokens of texts, also the first, but no padding."""

    cost = "One pass over the texts, shared by block_influence, magnitude and xmerge; two states."


class BlockInfluence(LayerChange):
    """1 − E cos(x, y) over all tokens, x the input and y the output of a layer (2403.03853, §2.3).

    It looks at single layers, so it does not see that two cancel each other, nor what changes
    lengths alone.
    """

    name = "block_influence"
    summary = "1 less the mean cosine of a layer's input and output, over all tokens."

    def costs(self, subject: Subject) -> Costs:
        found = layer_changes(subject)
        return layer_costs(subject, found.tokens - found.cosines, found.tokens, metric=self.name)


class Magnitude(LayerChange):
    """E ‖f(x)‖ / ‖x + f(x)‖ over all tokens, f(x) what a layer adds to its input x (2312.09299).

    It looks at single layers, so it does not see that two cancel each other; one that only scales
    the states costs c / (1 + c), though no norm behind it sees that.
    """

    name = "magnitude"
    summary = "Mean length of what a layer adds, over that of its output, over all tokens."

    def costs(self, subject: Subject) -> Costs:
        found = layer_changes(subject)
        return layer_costs(subject, found.magnitudes, found.tokens, metric=self.name)


class XMerge(LayerChange):
    """max(z(Block Influence), z(relative magnitude)), z a standard score over layers (2609.02083).

    A layer is cheap only if both say so. The deviation is that of the L layers, with divisor L;
    where all layers have one value, z is 0.
    """

    name = "xmerge"
    summary = "The larger of the standard scores of block_influence and magnitude over the layers."

    def costs(self, subject: Subject) -> Costs:
        found = layer_changes(subject)
        total = found.tokens.sum()
        influence = 1 - found.cosines.sum(axis=1) / total
        magnitude = found.magnitudes.sum(axis=1) / total
        return Costs.of_layers(
            np.maximum(_standard(influence), _standard(magnitude)),
            metric=self.name,
            model=subject.decoder.identity,
            texts=subject.texts,
            positions=ALL_TOKENS,
        )


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = values.std()
    return (values - values.mean()) / (deviation if deviation else 1.0)
