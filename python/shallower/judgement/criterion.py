"""Criterion: what says which layers to drop, by costs or by a search over sets of layers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

from ..errors import CostsError
from ..values.costs import Costs
from ..values.layers import blocks_of, check_sizes, dropped_layers
from ..values.plan import Plan
from .racing import ALPHA
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
        """Choose layers, for each of ``subject.sizes``.

        Args:
            subject: the model and its texts.

        Returns:
            Plans by size whose ``metric`` is the name of the criterion; sizes that cannot be are
            left out.

        Raises:
            CostsError: no block of a size was measured.
        """
        costs = subject.shared(("costs", self.name), lambda: self.costs(subject))
        return {n: costs.cheapest(n) for n in subject.sizes}


def has_costs(criterion: Criterion) -> bool:
    """Whether a criterion costs blocks, for all sizes; else it searches for one at a time."""
    return type(criterion).costs is not Criterion.costs


class Search(Criterion):
    """A criterion that finds the layers to drop for one size at a time.

    ``strategy`` is a row of ``STRATEGIES``; ``judged``: the set that was found is judged on all
    items, for the score of its plan; ``alpha`` is that of :func:`race`.
    """

    strategy: ClassVar[str] = "search"
    judged: ClassVar[bool] = True
    alpha: ClassVar[float] = ALPHA

    @abstractmethod
    def search(self, subject: Subject, n: int) -> Iterable[int]:
        """Find ``n`` layers to drop, in any order; other ``subject.sizes`` change nothing."""

    def plans(self, subject: Subject) -> Mapping[int, Plan]:
        """Search for each of ``subject.sizes``; a plan of one block has the judge's score."""
        check_sizes(subject.sizes, subject.num_layers)
        return {n: self._plan(subject, n) for n in subject.sizes}

    def _plan(self, subject: Subject, n: int) -> Plan:
        found = dropped_layers(subject.num_layers, self.search(subject, n))
        blocks = blocks_of(found)
        if self.judged and len(blocks) == 1:
            scores = subject.trials.scores(found)
            blocks = (replace(blocks[0], score=scores.mean, stderr=scores.stderr),)
        return Plan(
            subject.num_layers, blocks, self.strategy, self.name, model=subject.decoder.identity
        )
