"""Criterion: what says which layers to drop."""

from abc import ABC
from collections.abc import Mapping
from typing import ClassVar

from ..errors import CostsError
from ..values.costs import Costs
from ..values.plan import Plan
from .subject import Subject


class Criterion(ABC):
    """A way to choose layers: by the costs of blocks or of layers, or by a search over sets.

    Attributes:
        name: one word, as ``--criteria`` names it.
        summary: one line: what a cost is.
        cost: one line: the forwards and the memory that it takes.

    Example:
        >>> class Odd(sh.Criterion):
        ...     name = "odd"
        ...     summary = "Odd layers first."
        ...     cost = "Nothing."
        ...
        ...     def costs(self, subject):
        ...         values = [(layer + 1) % 2 for layer in range(subject.num_layers)]
        ...         return sh.Costs.of_layers(values, metric=self.name)
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    cost: ClassVar[str]

    def costs(self, subject: Subject) -> Costs:
        """Measure what every block or every layer costs; lower is better.

        Args:
            subject: the model and its texts.

        Returns:
            Costs whose ``metric`` is the name of the criterion.

        Raises:
            CostsError: the criterion searches over sets, and costs no block by itself.
        """
        raise CostsError(f"the criterion {self.name} searches over sets of layers: it has no costs")

    def plans(self, subject: Subject) -> Mapping[int, Plan]:
        """Choose layers, for every size that the subject is asked for.

        Args:
            subject: the model and its texts.

        Returns:
            A plan for each of ``subject.sizes``, whose ``metric`` is the name of the criterion;
            those that cannot be are left out.

        Raises:
            CostsError: no block of a size was measured.
        """
        costs = subject.meter.shared(("costs", self.name), lambda: self.costs(subject))
        return {n: costs.cheapest(n) for n in subject.sizes}
