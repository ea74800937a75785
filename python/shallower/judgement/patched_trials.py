"""Trials of cuts after a quick patch; several at once, where layers are streamed from disk."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError, PatchError
from ..evaluation.batches import layers_of, look_of, seconds_of, sums_of
from ..memory.prefix_cache import Place
from ..patching.quick import QuickPatch, out_of_memory
from ..results.patch import check_patchable
from ..results.scores import Scores
from ..values.entries import ResultStore, TrialJournal, recall
from ..values.layers import blocks_of
from ..values.plan import Plan
from ..values.schema import of_type
from .trials import AnyCut, Trials, judge_inputs

Cut = frozenset[int]


class PatchedTrials:
    """Cuts of one model, each judged after a quick patch on the items of its trials.

    ``trials`` are of the same model as it is cut: they judge, have the states before a patch, and
    count. The ``journal`` has records of earlier looks, and new ones are appended.
    """

    def __init__(
        self, trials: Trials, patch: QuickPatch, *, journal: TrialJournal | None = None
    ) -> None:
        self._trials, self.patch, self._journal = trials, patch, journal
        self._looked = defaultdict[Cut, dict[int, NDArray[np.float64]]](dict)
        self._failed: dict[Cut, ModelError | PatchError] = {}  # this time
        self._why: dict[Cut, str] = {}  # they can never be patched
        self._recalled: dict[tuple[Cut, int | None], float] = {}
        self._started = 0.0
        recall(journal, self._recall, "patched trials")

    def scores(self, cut: AnyCut, looks: int | None = None) -> Scores:
        """Judge a cut after a quick patch, which is solved anew if looks are missing."""
        trials, gone = self._trials, _layers_of(cut)
        self._judge([gone], looks)
        if gone in self._failed:
            raise self._failed[gone] if trials.model.is_streamed else self._failed.pop(gone)
        if gone in self._why:
            trials.add_seconds(self._recalled.pop((gone, None), 0.0))
            raise PatchError(self._why[gone])
        sums = np.full(trials.judge.num_items, np.nan)
        for index in trials.first(looks):
            self._count(gone, index)
            trials.add_seconds(self._recalled.pop((gone, index), 0.0))
            sums[trials.judge.items[index]] = self._looked[gone][index]
        return Scores(sums, trials.judge.weights)

    def judge_together(self, cuts: Iterable[AnyCut], looks: int | None = None) -> None:
        """Judge cuts after a quick patch at once, as :meth:`Trials.judge_together`."""
        if self._trials.model.is_streamed:
            self._judge(map(_layers_of, cuts), looks)

    def _judge(self, cuts: Iterable[Cut], looks: int | None) -> None:
        """Judge cuts on the batches that are missing of those whose patch did not fail."""
        trials = self._trials
        missing = {
            gone: indices
            for gone in cuts
            if gone not in self._failed
            and gone not in self._why
            and (indices := [one for one in trials.first(looks) if one not in self._looked[gone]])
        }
        if not missing:
            return
        self._started = trials.clock()  # the patch belongs to the first look
        trials.prepare(sorted({index for indices in missing.values() for index in indices}))
        if not trials.model.is_streamed:
            for one in missing.items():
                self._judge_in_memory(*one)
            return
        own, prefixes = self.patch.bytes_of_cut, trials.prefixes
        for group in prefixes.groups(missing, lambda one: prefixes.bytes_of(missing[one]) + own):
            self._judge_streamed({gone: missing[gone] for gone in group})

    def _judge_in_memory(self, gone: Cut, indices: Sequence[int]) -> None:
        """Judge a cut batch by batch, by forwards of the model that is patched meanwhile."""
        trials, model = self._trials, self._trials.model
        changed = [layer for layer in trials.path(gone) if layer >= min(gone) - 1]
        before: dict[Place, torch.Tensor] = {}
        try:
            with self.patch.patched(Plan.of(len(model), sorted(gone))):
                for index in indices:
                    trials.prefixes.run([_before(gone, index)], before.__setitem__)
                    start, batch = before.popitem()[1], trials.judge.batches[index]
                    sums = trials.measure_states(index, model.run(batch, start, changed))
                    self._take(gone, index, sums)
        except (ModelError, PatchError) as error:
            self._fail(gone, error)

    def _judge_streamed(self, cuts: Mapping[Cut, Sequence[int]]) -> None:
        """Patch and judge cuts layer by layer, each of which is read for all of them."""
        trials, model = self._trials, self._trials.model
        befores: dict[Place, torch.Tensor] = {}

        def job(gone: Cut, indices: Sequence[int]) -> Iterator[int]:
            def starts() -> list[torch.Tensor]:
                return [befores[_before(gone, index)] for index in indices]

            try:
                plan, batches = Plan.of(len(model), sorted(gone)), trials.judge.batches
                behind = yield from self.patch.run_cut(plan, [batches[i] for i in indices], starts)
                found = list(map(trials.measure_states, indices, behind))
            except torch.OutOfMemoryError as error:
                self._fail(gone, out_of_memory(error))
            except (ModelError, PatchError) as error:
                self._fail(gone, error)
            else:
                for one in zip(indices, found, strict=True):
                    self._take(gone, *one)

        places = [_before(gone, index) for gone, indices in cuts.items() for index in indices]
        with model.evaluating():
            before = trials.prefixes.job(places, befores.__setitem__)
            order = {layer for gone in cuts for layer in trials.path(gone)}
            model.in_step([before, *(job(*one) for one in cuts.items())], order)

    def _take(self, gone: Cut, index: int, sums: NDArray[np.float64]) -> None:
        """Keep what a look came to."""
        self._looked[gone][index] = sums
        self._note(gone, {"look": index, "sums": sums.tolist()})

    def _fail(self, gone: Cut, error: ModelError | PatchError) -> None:
        """Keep why a cut cannot be judged: for this time, or for good."""
        self._failed[gone] = error
        if stays(error):  # of memory there may be more another time
            self._why[gone] = str(error)
            self._note(gone, {"why": str(error)})

    def _count(self, gone: Cut, index: int) -> None:
        """Count a look, and the patch before it, and before that the whole model on every look."""
        trials, unchanged = self._trials, min(gone) - 1
        if trials.count is None:
            return
        texts = len(trials.judge.batches[index])
        trials.count_prepared(trials.first(None))
        trials.count.once("patch", len(trials.model) * self.patch.num_texts)
        trials.count.once(("patch", gone), patch_layers(gone) * self.patch.num_texts)
        before = tuple(range(unchanged))
        trials.count.run(("before", index, unchanged), index, before, texts=texts)
        changed = sum(layer >= unchanged for layer in trials.path(gone))
        trials.count.once(("patched", gone, index), changed * texts)

    def _note(self, gone: Cut, record: dict[str, Any]) -> None:
        if self._journal is not None:
            took = self._trials.clock() - self._started
            self._journal.append({"dropped": sorted(gone), **record, "seconds": took})
        self._started = self._trials.clock()

    def _recall(self, record: dict[str, Any]) -> None:
        gone = layers_of(record, len(self._trials.model))
        if not gone:
            raise ValueError("a patch of no cut")
        if "why" in record:
            self._why[gone] = of_type(str, record["why"])
            self._recalled[gone, None] = seconds_of(record)
            return
        items = self._trials.judge.items
        index = look_of(record, len(items))
        if gone in self._why:
            raise ValueError("a look at a cut that cannot be patched")
        self._looked[gone][index] = sums_of(record, len(items[index]))
        self._recalled[gone, index] = seconds_of(record)


def kept_patched(
    trials: Trials, patch: QuickPatch, *, store: ResultStore, items: str, fitted: str
) -> PatchedTrials:
    """Patched trials that the store keeps; ``fitted`` identifies the calibration texts."""
    on = {"items": items, "fitted": fitted, **judge_inputs(trials.judge)}
    journal = store.journal("trials", {"state": "quick", **on, **patch.settings})
    return PatchedTrials(trials, patch, journal=journal)


def _layers_of(cut: AnyCut) -> Cut:
    """The layers that go by a cut; PatchError where experts go."""
    if isinstance(cut, Plan):
        check_patchable(cut)
    return frozenset(cut.dropped if isinstance(cut, Plan) else cut)


def _before(cut: Cut, index: int) -> Place:
    """A batch, and the layers before the first that a patch of a cut changes."""
    return index, tuple(range(min(cut) - 1))


def patch_layers(dropped: Iterable[int]) -> int:
    """Count the layers that a quick patch of a cut runs on each text, the whole model made.

    The layer before every block is solved; from one such layer to the next the cut runs once.
    """
    blocks = blocks_of(sorted(dropped))
    return len(blocks) + sum(after.start - block.stop for block, after in pairwise(blocks))


def stays(error: Exception) -> bool:
    """Whether a cut can never be patched: of memory there may be more another time."""
    lacks = isinstance(error.__cause__, torch.OutOfMemoryError)
    return isinstance(error, PatchError) and not lacks
