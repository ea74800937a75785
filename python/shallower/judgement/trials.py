"""Trials: cuts judged by skipping layers, never by copying or reloading the model."""

import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..cutting.in_model import without_layers
from ..errors import LayersError, ModelError
from ..evaluation.batches import cut_journal, cut_of, look_of, recorded, seconds_of, sums_of
from ..memory.prefix_cache import Place, Prefixes
from ..models.architecture import swapped
from ..models.layerwise import Layerwise
from ..results.scores import Scores
from ..values.entries import ResultStore, TrialJournal, recall
from ..values.layers import layer_count
from ..values.plan import Gone, Plan, gone_by
from .judges.judge import Judge

AnyCut = Plan | Iterable[int]
"""A plan; or the layers that go, none for the whole model."""


@dataclass(slots=True)
class Count:
    """Layers that a search or a race runs by itself, times texts.

    It counts as if nothing had been judged before and there was memory for all states. So what a
    search costs, and how far a race goes, depends neither on what ran before nor on what is free.
    """

    layer_forwards: int = 0  # so far, without embedding and head
    report: Callable[[int], object] | None = None  # receives what is added, as for a bar
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


class Trials:
    """Cuts of one model, judged on the items of one judge.

    A trial is a cut on one batch of items. It is judged once, from the states that it shares with
    the trials before it (:class:`Prefixes`, of so much ``memory``); a cut of experts by a forward
    of all that is left.

    The ``journal`` has records of earlier trials, ``num_recalled``, and new ones are appended.
    ``prepared``: the judge knows the whole model, of which ``model`` is a changed one. ``count`` is
    of the open search or race; None outside :meth:`counted`. ``report`` receives what is added to
    it.
    """

    def __init__(
        self,
        model: Layerwise,
        judge: Judge,
        *,
        journal: TrialJournal | None = None,
        memory: int | None = None,
        prepared: bool = False,
    ) -> None:
        self.model, self.judge = model, judge
        self.count: Count | None = None
        self._seconds_recalled = 0.0
        self.report: Callable[[int], object] | None = None
        self.prefixes = Prefixes(model, judge.batches, memory=memory)
        self._prepares = type(judge).prepare is not Judge.prepare and not prepared
        self._prepared: set[int] = set()
        self._journal = journal
        self._judged: dict[tuple[Gone, int], NDArray[np.float64]] = {}
        self._failed: dict[tuple[Gone, int], ModelError] = {}
        self._recalled: dict[tuple[Gone, int], float] = {}
        recall(journal, self._recall, "trials")
        self.num_recalled = len(self._judged)

    @property
    def num_looks(self) -> int:
        """Batches of items, which are looked at one after the other."""
        return len(self.judge.batches)

    def clock(self) -> float:
        """Seconds from a moment that is the same for all calls; cached results add theirs."""
        return time.perf_counter() + self._seconds_recalled

    def add_seconds(self, recalled: float) -> None:
        """Add the recorded time of a cached result to :meth:`clock`."""
        self._seconds_recalled += recalled

    @contextmanager
    def counted(self) -> Iterator[Count]:
        """Count the layers of a search or a race, which is the body."""
        count = Count(report=self.report)
        with swapped(self, count=count):
            yield count

    def scores(self, cut: AnyCut, looks: int | None = None) -> Scores:
        """Judge a cut on the first ``looks`` batches or all; scores are NaN elsewhere."""
        cut = cut if isinstance(cut, Plan) else frozenset(cut)
        gone = gone_by(cut)
        if foreign := {one for one in gone if isinstance(one, int)} - set(range(len(self.model))):
            raise LayersError(
                f"the model has no layer {min(foreign)}: its {layer_count(len(self.model))} are "
                f"0 .. {len(self.model) - 1}"
            )
        self.judge_together([cut], looks)
        sums = np.full(self.judge.num_items, np.nan)
        for index in self.first(looks):
            sums[self.judge.items[index]] = self._look(gone, index)
        return Scores(sums, self.judge.weights)

    def judge_together(self, cuts: Iterable[AnyCut], looks: int | None = None) -> None:
        """Judge cuts on the first batches at once, where each layer is read from disk for all.

        :meth:`scores` gives what was found. Cuts of a model in memory are judged there, one after
        the other, but those of experts here.
        """
        gone = []
        for cut in cuts:
            if isinstance(cut, Plan) and cut.experts is not None:
                self._judge_whole(cut, looks)
            elif self.model.is_streamed:
                gone.append(gone_by(cut))
        self._judge((cut, index) for index in self.first(looks) for cut in gone)

    def prepare(self, indices: Iterable[int]) -> None:
        """Pass the judge the whole model's states on batches, each once, if it needs them."""
        if self._prepares:
            missing = [(one, self.path(())) for one in indices if one not in self._prepared]
            self.prefixes.run(missing, self._take_whole)

    def first(self, looks: int | None) -> range:
        """The first batches, ``looks`` of them or all."""
        return range(self.num_looks if looks is None else min(looks, self.num_looks))

    def looks_at(self, num_items: int) -> int:
        """Count the first batches that hold at least so many items; all if they hold fewer."""
        seen = list(accumulate(len(items) for items in self.judge.items))
        return min(1 + bisect_left(seen, num_items), self.num_looks)

    def path(self, dropped: Iterable[int | tuple[int, int]]) -> tuple[int, ...]:
        """List the layers that a cut has left; sorted by these, like beginnings are neighbours."""
        gone = frozenset(dropped)
        return tuple(layer for layer in range(len(self.model)) if layer not in gone)

    def _take_whole(self, place: Place, states: torch.Tensor) -> None:
        self.judge.prepare(self.model, place[0], states)
        self._prepared.add(place[0])

    def _judge_whole(self, plan: Plan, looks: int | None) -> None:
        """Judge a cut of experts, made once for all batches, on those that are missing."""
        gone, started = plan.gone, self.clock()
        missing = [index for index in self.first(looks) if (gone, index) not in self._judged]
        if not missing:
            return
        self.prepare(self.first(looks))  # all are measured, those of the journal too
        model = self.model.head.decoder.model
        with without_layers(model, plan):
            found = Trials(Layerwise(model), self.judge, prepared=True).scores((), looks)
        for index in missing:
            self._note((gone, index), found.sums[self.judge.items[index]], started)
            started = self.clock()

    def _judge(self, keys: Iterable[tuple[Gone, int]]) -> None:
        """Judge cuts on batches, unless that is done; what they took is shared among them."""
        missing = {
            (index, self.path(gone)): (gone, index)
            for gone, index in keys
            if (gone, index) not in self._judged and (gone, index) not in self._failed
        }
        started = self.clock()
        self.prepare(dict.fromkeys(index for index, _ in missing))

        def take(place: Place, states: torch.Tensor) -> None:
            nonlocal started
            key = missing[place]
            try:
                self._note(key, self.measure_states(place[0], states), started)
            except ModelError as error:
                self._failed[key] = error
            started = self.clock()

        self.prefixes.run(missing, take)

    def _look(self, gone: Gone, index: int) -> NDArray[np.float64]:
        key = gone, index
        self._judge([key])
        if key in self._failed:
            raise self._failed[key] if self.model.is_streamed else self._failed.pop(key)
        self.add_seconds(self._recalled.pop(key, 0.0))
        texts = len(self.judge.batches[index])
        if self.count is not None and any(isinstance(one, tuple) for one in gone):
            self.count.once((gone, index), len(self.path(gone)) * texts)
        elif self.count is not None:
            self.count_prepared([index])
            self.count.run((gone, index), index, self.path(gone), texts=texts)
        return self._judged[key]

    def count_prepared(self, indices: Iterable[int]) -> None:
        """Count the whole model on batches, in an open count, if the judge needs it there."""
        if self.count is None or not self._prepares:
            return
        for index in indices:
            texts = len(self.judge.batches[index])
            self.count.run(("whole", index), index, self.path(()), texts=texts)

    def _note(self, key: tuple[Gone, int], sums: NDArray[np.float64], started: float) -> None:
        """Keep what a trial came to, and how long it took."""
        self._judged[key] = sums
        if self._journal is not None:
            took, size = self.clock() - started, self.model.head.vocab_size
            self._journal.append(recorded(*key, sums=sums, seconds=took, vocab_size=size))

    def measure_states(self, index: int, states: torch.Tensor) -> NDArray[np.float64]:
        """Judge a batch by the states behind a cut's last layer."""
        with self.model.starting_from(states, ()):
            return self.judge.measure(self.model.head, index)

    def _recall(self, record: dict[str, Any]) -> None:
        key = cut_of(record, len(self.model)), look_of(record, self.num_looks)
        self._judged[key] = sums_of(record, len(self.judge.items[key[1]]))
        self._recalled[key] = seconds_of(record)


def judge_inputs(judge: Judge) -> dict[str, Any]:
    """What the records of a judge's trials depend on beside the model and the items."""
    content = {"content": judge.content} if judge.content else {}
    return {"judge": judge.name, "looks": [len(items) for items in judge.items], **content}


def kept_trials(model: Layerwise, judge: Judge, *, store: ResultStore, items: str) -> Trials:
    """Trials that the store keeps, batch by batch; ``items`` identifies those of the judge."""
    return Trials(model, judge, journal=cut_journal(store, items, judge_inputs(judge)))
