"""Trials: cuts judged by skipping layers, never by copying or reloading the model."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..models.layerwise import Layerwise
from ..values.scores import Scores
from .judges.judge import Judge
from .work import Meter


class Journal(Protocol):
    """Records of trials that outlive the process."""

    def read(self) -> Sequence[dict[str, Any]]:
        """Give all records that were appended, by this process or one before it."""

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, which is there whole after any death, or not at all."""


class Trials:
    """Cuts of one model, judged on the items of one judge.

    A cut is judged once; whoever asks for it again is charged for it again, so that each
    criterion has the cost that it has by itself.

    Args:
        model: the whole model.
        judge: with the items that choose, or those that report.
        meter: whose accounts are charged.
        journal: records of trials that were made before; new ones are appended.
    """

    def __init__(
        self, model: Layerwise, judge: Judge, *, meter: Meter, journal: Journal | None = None
    ) -> None:
        self.model, self.judge, self.meter = model, judge, meter

    @property
    def num_looks(self) -> int:
        """Batches of items, which are looked at one after the other."""
        return len(self.judge.batches)

    def scores(self, dropped: Iterable[int], looks: int | None = None) -> Scores:
        """Judge a cut.

        Args:
            dropped: the layers that the model is without; none for the whole model.
            looks: judge the items of the first so many batches only.

        Returns:
            The scores by item, NaN for those that were not looked at.

        Raises:
            ModelError: a score is not finite.
        """
        gone = frozenset(dropped)
        sums = np.full(self.judge.num_items, np.nan)
        for index in range(self.num_looks if looks is None else min(looks, self.num_looks)):
            sums[self.judge.items[index]] = self.meter.shared(
                ("trial", id(self), gone, index), partial(self._measure, gone, index)
            )
        return Scores(sums, self.judge.weights)

    def _measure(self, gone: frozenset[int], index: int) -> np.ndarray:
        batch = self.judge.batches[index]
        layers = [layer for layer in range(len(self.model)) if layer not in gone]
        states = self.model.run(batch, self.model.embed(batch), layers)
        self.meter.ran(len(layers), len(batch))
        with self.model.starting_from(states, ()):
            return self.judge.measure(self.model.head, index)
