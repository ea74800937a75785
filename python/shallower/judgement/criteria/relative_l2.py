"""Relative Euclidean distance between the ends of a block."""

from ...values.costs import Costs
from ..criterion import Criterion
from ..similarity import COST, shared_scan
from ..subject import Subject


class RelativeL2(Criterion):
    """The mean of ‖x⁽ᵐ⁾ − x⁽ˡ⁾‖ / ‖x⁽ˡ⁾‖ at the last token.

    A layer that only scales the states costs what it scales them by, although no norm behind it
    would see that.
    """

    name = "relative_l2"
    summary = "Mean length of what a block adds, over that of its input, at the last token."
    cost = COST

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`."""
        return shared_scan(subject).costs(self.name)
