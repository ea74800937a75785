"""Angular distance between the ends of a block."""

from ...values.costs import Costs
from ..criterion import Criterion
from ..similarity import COST, shared_scan
from ..subject import Subject


class Angular(Criterion):
    """The mean angle between x⁽ˡ⁾ and x⁽ᵐ⁾ at the last token, over π (2403.17887, eq. 5).

    It does not see what changes the length of the states alone.
    """

    name = "angular"
    summary = "Mean angle between the states at both ends of a block, at the last token."
    cost = COST

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`."""
        return shared_scan(subject).costs(self.name)
