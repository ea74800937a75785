"""Relative magnitude: how long the part is that a layer adds, over all tokens."""

from ...values.costs import Costs
from ..criterion import Criterion
from ..subject import Subject
from ..token_states import layer_changes, layer_costs


class Magnitude(Criterion):
    """E ‖f(x)‖ / ‖x + f(x)‖ over all tokens, f(x) what a layer adds to its input x (2312.09299).

    Padding never counts. It looks at single layers, so it does not see that two cancel each
    other; one that only scales the states costs c / (1 + c), though no norm behind it sees that.
    """

    name = "magnitude"
    summary = "Mean length of what a layer adds, over that of its output, over all tokens."
    cost = "One pass over the texts, shared by block_influence, magnitude and xmerge; two states."

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`."""
        found = layer_changes(subject)
        return layer_costs(subject, found.magnitudes, found.tokens, metric=self.name)
