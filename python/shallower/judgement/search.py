"""Search: a criterion that names sets of layers, and costs no block by itself."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

from ..progress import Advance, track
from ..values.layers import blocks_of, check_sizes, dropped_layers
from ..values.plan import Plan
from .criterion import Criterion
from .racing import ALPHA
from .subject import Subject


class Search(Criterion):
    """A criterion that finds the layers to drop for one size at a time.

    Attributes:
        strategy: a row of ``STRATEGIES``.
        judged: whether the set that was found is judged on all items, for the score of its plan.
        alpha: of races, as for :func:`race`.
    """

    strategy: ClassVar[str] = "search"
    judged: ClassVar[bool] = True
    alpha: ClassVar[float] = ALPHA

    @abstractmethod
    def search(self, subject: Subject, n: int, advance: Advance) -> Iterable[int]:
        """Find the layers to drop; what is found does not depend on ``subject.sizes``.

        Args:
            subject: the model and its texts.
            n: how many, at least 1 and fewer than there are.
            advance: of a bar of :meth:`steps`.

        Returns:
            Their indices, in any order.
        """

    def steps(self, _subject: Subject, _n: int) -> int:
        """Count the steps of a bar for :meth:`search`.

        Args:
            _subject: the model and its texts.
            _n: how many layers are to go.

        Returns:
            The steps, at most.
        """
        return 1

    def plans(self, subject: Subject) -> Mapping[int, Plan]:
        """Search for every size that the subject is asked for.

        Args:
            subject: the model and its texts.

        Returns:
            A plan for each of ``subject.sizes``. One of a single block has the score of the
            judge, its mean over all items with its error.

        Raises:
            LayersError: a size that the model cannot lose.
            ModelError: a score is not finite.
        """
        check_sizes(subject.sizes, subject.num_layers)
        return {n: self._plan(subject, n) for n in subject.sizes}

    def _plan(self, subject: Subject, n: int) -> Plan:
        steps = self.steps(subject, n)
        with track(f"{self.name}, n = {n}", steps, subject.progress) as advance:
            found = dropped_layers(subject.num_layers, self.search(subject, n, advance))
        blocks = blocks_of(found)
        if self.judged and len(blocks) == 1:
            scores = subject.trials.scores(found)
            blocks = (replace(blocks[0], score=scores.mean, stderr=scores.stderr),)
        return Plan(
            subject.num_layers, blocks, self.strategy, self.name, model=subject.decoder.identity
        )
