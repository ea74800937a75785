"""Trials: cuts judged by skipping layers, never by copying or reloading the model."""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import CacheError, LayersError, PatchError, PlanError
from ..memory.prefix_cache import Prefixes
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..values.layers import blocks_of, layer_count
from ..values.plan import Plan
from ..values.schema import of_type
from ..values.scores import Scores
from .judges.judge import Judge

Value = TypeVar("Value")


class Journal(Protocol):
    """Records of trials that outlive the process."""

    def read(self) -> Sequence[dict[str, Any]]:
        """Give all records that were appended, by this process or one before it."""

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, which is there whole after any death, or not at all."""


class ResultStore(Protocol):
    """Results of one model that outlive the process."""

    def get(self, kind: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Give what was put under the same kind and inputs; None if there is nothing."""

    def put(self, kind: str, inputs: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Keep a result, whole or not at all."""

    def journal(self, kind: str, inputs: Mapping[str, Any]) -> Journal | None:
        """Open a journal; None if nothing is kept."""


@dataclass(slots=True)
class Count:
    """Layers that a search or a race runs by itself, times texts.

    It counts as if nothing had been judged before and there was memory for all states: so what a
    search costs, and how far a race goes, depends neither on what ran before nor on what is free.

    Attributes:
        layer_forwards: the sum so far. The embedding and the head are not counted.
        report: receives what is added, as for a bar.
    """

    layer_forwards: int = 0
    report: Callable[[int], object] | None = None
    _counted: set[Hashable] = field(default_factory=set)
    _paths: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)

    def once(self, what: Hashable, layer_forwards: int) -> None:
        """Add something, unless it was counted before."""
        if what not in self._counted:
            self._counted.add(what)
            self.layer_forwards += layer_forwards
            if self.report is not None:
                self.report(layer_forwards)

    def run(self, what: Hashable, index: int, path: tuple[int, ...], *, texts: int) -> None:
        """Add the layers of a path on a batch, without the longest beginning that has run on it."""
        if what in self._counted:
            return
        depths = range(len(path), 0, -1)
        start = next((depth for depth in depths if (index, path[:depth]) in self._paths), 0)
        # Final states are not kept, so a path's own end is no beginning of a longer one.
        self._paths |= {(index, path[:depth]) for depth in range(start + 1, len(path))}
        self.once(what, (len(path) - start) * texts)


class Clock:
    """Wall time, in which what is recalled takes as long as it did when it was measured."""

    def __init__(self) -> None:
        self._recalled = 0.0

    def __call__(self) -> float:
        """Seconds from a moment that is the same for all calls."""
        return time.perf_counter() + self._recalled

    def recall(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self._recalled += seconds


class Trials:
    """Cuts of one model, judged on the items of one judge.

    A trial is a cut on one batch of items. It is judged once, from the states that it shares with
    the trials before it (:class:`Prefixes`).

    Args:
        model: the whole model.
        judge: with the items that choose, or those that report.
        journal: records of trials of this model and judge that were made before; new ones are
            appended. A CacheError names a record that is damaged.
        memory: bytes for states that trials share, as for :class:`Prefixes`.

    Attributes:
        count: layers of the open search or race; None outside :meth:`counted`.
        clock: the time that the work takes, or took.
        report: receives what is added to a count.
        num_recalled: trials of the journal.
    """

    def __init__(
        self,
        model: Layerwise,
        judge: Judge,
        *,
        journal: Journal | None = None,
        memory: int | None = None,
    ) -> None:
        self.model, self.judge = model, judge
        self.count: Count | None = None
        self.clock = Clock()
        self.report: Callable[[int], object] | None = None
        self._prefixes = Prefixes(model, judge.batches, memory=memory)
        self._prepares = type(judge).prepare is not Judge.prepare
        self._prepared: set[int] = set()
        self._journal = journal
        self._judged: dict[tuple[frozenset[int], int], NDArray[np.float64]] = {}
        self._recalled: dict[tuple[frozenset[int], int], float] = {}
        recall(journal, self._recall, "trials")
        self.num_recalled = len(self._judged)

    @property
    def num_looks(self) -> int:
        """Batches of items, which are looked at one after the other."""
        return len(self.judge.batches)

    @contextmanager
    def counted(self) -> Iterator[Count]:
        """Count the layers of a search or a race, which is the body."""
        before, self.count = self.count, Count(report=self.report)
        try:
            yield self.count
        finally:
            self.count = before

    def scores(self, dropped: Iterable[int], looks: int | None = None) -> Scores:
        """Judge a cut on the items of the first batches, ``looks`` of them or all.

        The scores are NaN for items that were not looked at. A LayersError names a layer that the
        model does not have; a ModelError says that a score is not finite.
        """
        gone = frozenset(dropped)
        if foreign := gone - set(range(len(self.model))):
            raise LayersError(
                f"the model has no layer {min(foreign)}: its {layer_count(len(self.model))} are "
                f"0 .. {len(self.model) - 1}"
            )
        sums = np.full(self.judge.num_items, np.nan)
        for index in self.first(looks):
            sums[self.judge.items[index]] = self._look(gone, index)
        return Scores(sums, self.judge.weights)

    def first(self, looks: int | None) -> range:
        """The first batches, ``looks`` of them or all."""
        return range(self.num_looks if looks is None else min(looks, self.num_looks))

    def looks_at(self, num_items: int) -> int:
        """Count the first batches that hold at least so many items; all if they hold fewer."""
        return looks_at([len(items) for items in self.judge.items], num_items)

    def judge_changed(
        self, dropped: Iterable[int], index: int, *, unchanged: int
    ) -> NDArray[np.float64]:
        """Judge a cut on a batch while weights of the model are changed, by a patch maybe.

        The first ``unchanged`` layers are as the trials know them. Nothing of the rest is kept.
        A ModelError says that a score is not finite.
        """
        changed = [layer for layer in self.path(dropped) if layer >= unchanged]
        known, _ = self._prefixes.run(index, tuple(range(unchanged)))
        states = self.model.run(self.judge.batches[index], known, changed)
        with self.model.starting_from(states, ()):
            return self.judge.measure(self.model.head, index)

    def prepare(self, index: int) -> None:
        """Pass the judge the whole model's states on a batch, once, if it needs them."""
        if not self._prepares or index in self._prepared:
            return
        states, _ = self._prefixes.run(index, self.path(()))
        self.judge.prepare(self.model, index, states)
        self._prepared.add(index)

    def path(self, dropped: Iterable[int]) -> tuple[int, ...]:
        """List the layers that a cut has left, ascending.

        Sorted by their paths, cuts that begin alike are neighbours: so trials need least memory.
        """
        gone = frozenset(dropped)
        return tuple(layer for layer in range(len(self.model)) if layer not in gone)

    def _look(self, gone: frozenset[int], index: int) -> NDArray[np.float64]:
        key = gone, index
        if key not in self._judged:
            started = self.clock()
            self._judged[key] = sums = self._measure(gone, index)
            if self._journal is not None:
                took = self.clock() - started
                record = {"look": index, "sums": sums.tolist(), "seconds": took}
                self._journal.append({"dropped": sorted(gone), **record})
        self.clock.recall(self._recalled.pop(key, 0.0))
        if self.count is not None:
            texts = len(self.judge.batches[index])
            if self._prepares:
                self.count.run(("whole", index), index, self.path(()), texts=texts)
            self.count.run((gone, index), index, self.path(gone), texts=texts)
        return self._judged[key]

    def _measure(self, gone: frozenset[int], index: int) -> NDArray[np.float64]:
        self.prepare(index)
        states, _ = self._prefixes.run(index, self.path(gone))
        with self.model.starting_from(states, ()):
            return self.judge.measure(self.model.head, index)

    def _recall(self, record: dict[str, Any]) -> None:
        key = _cut_of(record, len(self.model)), _look_of(record, self.num_looks)
        self._judged[key] = _sums_of(record, len(self.judge.items[key[1]]))
        self._recalled[key] = _seconds_of(record)


class PatchedTrials:
    """Cuts of one model, each judged after a quick patch on the items of its trials.

    Args:
        trials: of the same model as it is cut; they judge, know the states before a patch, and
            count.
        patch: on texts that fit.
        num_texts: how many those are.
        journal: records of looks that were made before; new ones are appended. A CacheError names
            a record that is damaged.
    """

    def __init__(
        self, trials: Trials, patch: QuickPatch, *, num_texts: int, journal: Journal | None = None
    ) -> None:
        self._trials, self._patch, self._journal = trials, patch, journal
        self.num_texts = num_texts
        self._looked: dict[frozenset[int], dict[int, NDArray[np.float64]] | str] = {}
        self._recalled: dict[tuple[frozenset[int], int | None], float] = {}
        recall(journal, self._recall, "patched trials")

    def scores(self, dropped: Iterable[int], looks: int | None = None) -> Scores:
        """Judge a cut after a quick patch, which is solved anew if looks are missing.

        As :meth:`Trials.scores`; a PatchError says why a cut cannot be patched.
        """
        trials, gone = self._trials, frozenset(dropped)
        looked = self._looked.get(gone, {})
        if isinstance(looked, str):
            trials.clock.recall(self._recalled.pop((gone, None), 0.0))
            raise PatchError(looked)
        missing = [index for index in trials.first(looks) if index not in looked]
        if missing:
            started = trials.clock()  # the patch belongs to the first look
            with ExitStack() as stack:
                self._solve(gone, stack)
                for index in missing:
                    looked[index] = trials.judge_changed(gone, index, unchanged=min(gone) - 1)
                    self._note(gone, started, {"look": index, "sums": looked[index].tolist()})
                    started = trials.clock()
            self._looked[gone] = looked
        sums = np.full(trials.judge.num_items, np.nan)
        for index in trials.first(looks):
            self._count(gone, index)
            trials.clock.recall(self._recalled.pop((gone, index), 0.0))
            sums[trials.judge.items[index]] = looked[index]
        return Scores(sums, trials.judge.weights)

    def _solve(self, gone: frozenset[int], stack: ExitStack) -> None:
        """Patch the model until the stack is closed; why that cannot be is remembered."""
        trials = self._trials
        started = trials.clock()
        for index in range(trials.num_looks):
            trials.prepare(index)  # by the whole model, which there is none of from here on
        try:
            stack.enter_context(self._patch.patched(Plan.of(len(trials.model), sorted(gone))))
        except PatchError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                self._looked[gone] = str(error)  # of memory there may be more another time
                self._note(gone, started, {"why": str(error)})
            raise

    def _count(self, gone: frozenset[int], index: int) -> None:
        """Count a look, and the patch before it."""
        trials, unchanged = self._trials, min(gone) - 1
        if trials.count is None:
            return
        texts = len(trials.judge.batches[index])
        trials.count.once("patch", len(trials.model) * self.num_texts)
        trials.count.once(("patch", gone), patch_layers(gone) * self.num_texts)
        before = tuple(range(unchanged))
        trials.count.run(("before", index, unchanged), index, before, texts=texts)
        changed = sum(layer >= unchanged for layer in trials.path(gone))
        trials.count.once(("patched", gone, index), changed * texts)

    def _note(self, gone: frozenset[int], started: float, record: dict[str, Any]) -> None:
        if self._journal is not None:
            took = self._trials.clock() - started
            self._journal.append({"dropped": sorted(gone), **record, "seconds": took})

    def _recall(self, record: dict[str, Any]) -> None:
        gone = _cut_of(record, len(self._trials.model))
        if not gone:
            raise ValueError("a patch of no cut")
        if "why" in record:
            self._looked[gone] = of_type(str, record["why"])
            self._recalled[gone, None] = _seconds_of(record)
            return
        items = self._trials.judge.items
        index = _look_of(record, len(items))
        looked = self._looked.setdefault(gone, {})
        if isinstance(looked, str):
            raise ValueError("a look at a cut that cannot be patched")
        looked[index] = _sums_of(record, len(items[index]))
        self._recalled[gone, index] = _seconds_of(record)


def looks_at(looks: Sequence[int], num_items: int) -> int:
    """Count the first of looks of so many items each that hold ``num_items``; all if fewer."""
    return min(1 + bisect_left(list(accumulate(looks)), num_items), len(looks))


def patch_layers(dropped: Iterable[int]) -> int:
    """Count the layers that a quick patch of a cut runs on each text, the whole model made.

    The layer before every block is solved; from one such layer to the next the cut runs once.
    """
    blocks = blocks_of(sorted(dropped))
    return len(blocks) + sum(after.start - block.stop for block, after in pairwise(blocks))


def recall(journal: Journal | None, take: Callable[[dict[str, Any]], None], what: str) -> None:
    """Read the records of a journal, if there is one.

    ``take`` raises KeyError, TypeError or ValueError for a record that is damaged, which becomes a
    CacheError that names it.
    """
    for number, record in enumerate(() if journal is None else journal.read()):
        try:
            take(record)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"record {number} of the {what} that were made before is damaged ({error}): "
                f"remove them (shallower cache --clear), or make them anew (--no-cache)"
            ) from error


def recalled(read: Callable[[dict[str, Any]], Value], known: dict[str, Any], what: str) -> Value:
    """Read a value that the store holds; a CacheError says that it is damaged."""
    try:
        return read(known)
    except (KeyError, TypeError, ValueError, LayersError, PlanError) as error:
        raise CacheError(
            f"{what} in the store is damaged ({error}): remove it (shallower cache --clear), or "
            f"make it anew (--no-cache)"
        ) from error


def _cut_of(record: Any, num_layers: int) -> frozenset[int]:
    layers = [of_type(int, layer) for layer in of_type(list, of_type(dict, record)["dropped"])]
    if layers != sorted(set(layers) & set(range(num_layers))):
        raise ValueError(f"layers {layers} of {num_layers}")
    return frozenset(layers)


def _look_of(record: dict[str, Any], num_looks: int) -> int:
    index = of_type(int, record["look"])
    if not 0 <= index < num_looks:
        raise ValueError(f"look {index} of {num_looks}")
    return index


def _seconds_of(record: dict[str, Any]) -> float:
    seconds = of_type(float, record["seconds"])
    if not 0 <= seconds < math.inf:
        raise ValueError(f"it took {seconds} seconds")
    return seconds


def _sums_of(record: dict[str, Any], num_items: int) -> NDArray[np.float64]:
    sums = [of_type(float, value) for value in of_type(list, record["sums"])]
    if len(sums) != num_items:
        raise ValueError(f"{len(sums)} scores of {num_items} items")
    if not all(map(math.isfinite, sums)):
        raise ValueError("a score is not finite")
    return np.array(sums)
