"""Linear CKA between the ends of a block."""

import numpy as np

from ...errors import CriterionError
from ...scanning.cka import MIN_BATCH
from ...values.costs import Costs
from ..criterion import Criterion
from ..similarity import COST, shared_scan
from ..subject import Subject


class LinearCka(Criterion):
    """1 less the linear CKA of x⁽ˡ⁾ and x⁽ᵐ⁾ across texts, at the last token (2010.15327, eq. 2).

    It compares how texts lie towards one another, and so sees no rotation and no scaling that is
    the same for all of them. Minibatches of up to 64 texts are unbiased, and noisy where there
    are few texts; below 4 there are none.
    """

    name = "cka"
    summary = "1 less the linear CKA of the states at both ends of a block, across texts."
    cost = COST

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`.

        Raises:
            CriterionError: fewer than 4 texts fit.
        """
        scanned = shared_scan(subject)
        if scanned.num_samples < MIN_BATCH:
            raise CriterionError(
                f"the criterion {self.name} compares how texts lie towards one another: "
                f"{scanned.num_samples} texts are too few, give at least {MIN_BATCH} (--texts)"
            )
        return Costs.of_blocks(
            1 - np.triu(scanned.cka), metric=self.name, model=scanned.model, texts=scanned.texts,
            positions=scanned.positions,
        )  # fmt: skip
