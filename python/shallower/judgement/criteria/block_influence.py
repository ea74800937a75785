"""Block Influence: how much a layer turns the states of all tokens."""

from ...values.costs import Costs
from ..criterion import Criterion
from ..subject import Subject
from ..token_states import layer_changes, layer_costs


class BlockInfluence(Criterion):
    """1 − E cos(x, y) over all tokens, x the input and y the output of a layer (2403.03853, §2.3).

    Padding never counts; the first tokens of texts do, as in the paper. It looks at single
    layers, so it does not see that two cancel each other, nor what changes lengths alone.
    """

    name = "block_influence"
    summary = "1 less the mean cosine of a layer's input and output, over all tokens."
    cost = "One pass over the texts, shared by block_influence, magnitude and xmerge; two states."

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`."""
        found = layer_changes(subject)
        return layer_costs(subject, found.tokens - found.cosines, found.tokens, metric=self.name)
