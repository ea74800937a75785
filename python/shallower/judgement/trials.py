"""Trials: cuts judged by skipping layers, never by copying or reloading the model."""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import CacheError, LayersError
from ..memory.prefix_cache import Known, Prefixes
from ..models.layerwise import Layerwise
from ..values.schema import of_type
from ..values.scores import Scores
from .judges.judge import Judge
from .work import Meter, Work


class Journal(Protocol):
    """Records of trials that outlive the process."""

    def read(self) -> Sequence[dict[str, Any]]:
        """Give all records that were appended, by this process or one before it."""

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, which is there whole after any death, or not at all."""


@dataclass(frozen=True, slots=True)
class _Judged:
    """What came of a trial: its scores, and what they took where they were made."""

    sums: NDArray[np.float64]
    layers: int  # that ran, each on all texts of the batch
    layer_seconds: float
    judge_seconds: float


class Trials:
    """Cuts of one model, judged on the items of one judge.

    A trial is a cut on one batch of items. It is judged once, from the states that it shares with
    the trials before it (:class:`Prefixes`). Whoever asks for it again is charged for it again: an
    account is charged for the layers that it would have run by itself with memory for all states.
    What runs again for lack of memory is charged to nobody, so that no charge depends on how much
    is free.

    Args:
        model: the whole model.
        judge: with the items that choose, or those that report.
        meter: whose accounts are charged.
        journal: records of trials of this model and judge that were made before; new ones are
            appended.
        memory: bytes for states that trials share, as for :class:`Prefixes`.

    Raises:
        CacheError: a record of the journal is none of such a trial.
    """

    def __init__(
        self,
        model: Layerwise,
        judge: Judge,
        *,
        meter: Meter,
        journal: Journal | None = None,
        memory: int | None = None,
    ) -> None:
        self.model, self.judge, self.meter = model, judge, meter
        self._prefixes = Prefixes(model, judge.batches, memory=memory)
        self._prepares = type(judge).prepare is not Judge.prepare
        self._prepared: set[int] = set()
        self._journal = journal
        self._judged: dict[tuple[frozenset[int], int], _Judged] = {}
        recall(journal, self._recall, "trials")

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
            LayersError: the model has no such layer.
            ModelError: a score is not finite.
        """
        gone = frozenset(dropped)
        if foreign := gone - set(range(len(self.model))):
            raise LayersError(
                f"the model has no layer {min(foreign)}: its {len(self.model)} layers are "
                f"0 .. {len(self.model) - 1}"
            )
        sums = np.full(self.judge.num_items, np.nan)
        for index in range(self.num_looks if looks is None else min(looks, self.num_looks)):
            sums[self.judge.items[index]] = self._look(gone, index).sums
        return Scores(sums, self.judge.weights)

    def looks_at(self, num_items: int) -> int:
        """Count the first batches that hold so many items.

        Args:
            num_items: at least so many.

        Returns:
            Batches; all of them where there are fewer items.
        """
        seen = list(accumulate(len(items) for items in self.judge.items))
        return min(1 + bisect_left(seen, num_items), self.num_looks)

    def states(self, index: int, depth: int) -> torch.Tensor:
        """Run the first layers of the whole model on a batch, from the states that are known.

        Args:
            index: of the batch.
            depth: how many layers.

        Returns:
            (B, T, D), x^(depth).
        """
        return self._prefixes.run(index, tuple(range(depth)))[0]

    def judge_changed(
        self, dropped: Iterable[int], index: int, *, unchanged: int
    ) -> NDArray[np.float64]:
        """Judge a cut on a batch while weights of the model are changed, by a patch maybe.

        Nothing of it is kept or charged.

        Args:
            dropped: the layers that the model is without.
            index: of the batch.
            unchanged: the first so many layers are as the trials know them.

        Returns:
            (items of the batch,) float64, the sum over each item.

        Raises:
            ModelError: a score is not finite.
        """
        changed = [layer for layer in self.path(dropped) if layer >= unchanged]
        states = self.model.run(self.judge.batches[index], self.states(index, unchanged), changed)
        with self.model.starting_from(states, ()):
            return self.judge.measure(self.model.head, index)

    def charge_states(self, index: int, depth: int) -> None:
        """Charge the open account for :meth:`states`, whether they are made or known.

        Args:
            index: of the batch.
            depth: how many layers.
        """
        if self.meter.owes(name := ("states", id(self), index, depth)):
            layers = self._known().count(index, tuple(range(depth)))
            self.meter.charge(name, Work(layers * len(self.judge.batches[index])))

    def prepare(self, index: int) -> int:
        """Let the judge hear of the whole model on a batch, unless it has.

        Args:
            index: of the batch.

        Returns:
            The layers that ran.
        """
        if not self._prepares or index in self._prepared:
            return 0
        states, ran = self._prefixes.run(index, self.path(()))
        self.judge.prepare(self.model, index, states)
        self._prepared.add(index)
        return ran

    def path(self, dropped: Iterable[int]) -> tuple[int, ...]:
        """Give the layers that a cut has left.

        Sorted by their paths, cuts that begin alike are neighbours: so trials need least memory.

        Args:
            dropped: the layers that the model is without.

        Returns:
            Indices, ascending.
        """
        gone = frozenset(dropped)
        return tuple(layer for layer in range(len(self.model)) if layer not in gone)

    def _look(self, gone: frozenset[int], index: int) -> _Judged:
        key = gone, index
        if key not in self._judged:
            with self.meter.account():  # its time is charged below, and not as it passes
                self._judged[key] = self._measure(gone, index)
            if self._journal is not None:
                self._journal.append(_record(gone, index, self._judged[key]))
        judged, name = self._judged[key], ("trial", id(self), gone, index)
        if self.meter.owes(name):
            self.meter.charge(name, self._cost(judged, gone, index))
        return judged

    def _measure(self, gone: frozenset[int], index: int) -> _Judged:
        started = time.perf_counter()
        ran = self.prepare(index)
        states, more = self._prefixes.run(index, self.path(gone))
        there = time.perf_counter()
        with self.model.starting_from(states, ()):
            sums = self.judge.measure(self.model.head, index)
        return _Judged(sums, ran + more, there - started, time.perf_counter() - there)

    def _cost(self, judged: _Judged, gone: frozenset[int], index: int) -> Work:
        """The work of a trial for an account that made and kept all others of its trials."""
        known, layers = self._known(), 0
        if self._prepares and self.meter.owes(prepared := ("prepared", id(self), index)):
            self.meter.charge(prepared, Work())
            layers = known.count(index, self.path(()))
        layers += known.count(index, self.path(gone))
        seconds = judged.judge_seconds + layers * self._seconds_of_layer(judged)
        return Work(layers * len(self.judge.batches[index]), seconds)

    def _known(self) -> Known:
        """The states that the open account has paid for."""
        return self.meter.own(("known", id(self)), self._prefixes.known)

    def _seconds_of_layer(self, judged: _Judged) -> float:
        """What a layer took on the batch; if none ran there, what one took in all trials."""
        if judged.layers:
            return judged.layer_seconds / judged.layers
        made = self._judged.values()
        return sum(one.layer_seconds for one in made) / max(1, sum(one.layers for one in made))

    def _recall(self, record: dict[str, Any]) -> None:
        gone = [of_type(int, layer) for layer in of_type(list, of_type(dict, record)["dropped"])]
        if gone != sorted(set(gone) & set(range(len(self.model)))):
            raise ValueError(f"layers {gone} of {len(self.model)}")
        index = of_type(int, record["look"])
        if not 0 <= index < self.num_looks:
            raise ValueError(f"look {index} of {self.num_looks}")
        sums = [of_type(float, value) for value in of_type(list, record["sums"])]
        if len(sums) != len(self.judge.items[index]):
            raise ValueError(f"{len(sums)} scores of {len(self.judge.items[index])} items")
        times = [of_type(float, record[name]) for name in ("layer_seconds", "judge_seconds")]
        layers = of_type(int, record["layers"])
        if not all(map(math.isfinite, [*sums, *times])) or min(layers, *times) < 0:
            raise ValueError("a number is not finite, or negative")
        self._judged[frozenset(gone), index] = _Judged(np.array(sums), layers, *times)


def recall(journal: Journal | None, take: Callable[[dict[str, Any]], None], what: str) -> None:
    """Read the records of a journal.

    Args:
        journal: of trials that were made before; None where nothing is kept.
        take: takes a record, and raises KeyError, TypeError or ValueError for one that is damaged.
        what: they are of, for the error.

    Raises:
        CacheError: a record is damaged.
    """
    for number, record in enumerate(() if journal is None else journal.read()):
        try:
            take(record)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"record {number} of the {what} that were made before is damaged ({error}): "
                f"remove them (shallower cache --clear), or make them anew (--no-cache)"
            ) from error


def _record(gone: frozenset[int], index: int, judged: _Judged) -> dict[str, Any]:
    return {
        "dropped": sorted(gone),
        "look": index,
        "sums": judged.sums.tolist(),
        "layers": judged.layers,
        "layer_seconds": judged.layer_seconds,
        "judge_seconds": judged.judge_seconds,
    }
