"""Trials of cuts after a quick patch; several at once, where layers are streamed from disk."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError, PatchError
from ..memory.prefix_cache import Place
from ..patching.quick import QuickPatch, out_of_memory
from ..values.layers import blocks_of
from ..values.patch import refuse_experts
from ..values.plan import Plan
from ..values.schema import of_type
from ..values.scores import Scores
from .trials import (
    AnyCut,
    Journal,
    ResultStore,
    Trials,
    judge_inputs,
    layers_of,
    look_of,
    recall,
    seconds_of,
    sums_of,
)

Cut = frozenset[int]

Judged = dict[int, NDArray[np.float64]] | ModelError | PatchError
"""The sums of a cut by batch, or why there are none."""


class PatchedTrials:
    """Cuts of one model, each judged after a quick patch on the items of its trials.

    Args:
        trials: of the same model as it is cut; they judge, know the states before a patch, and
            count.
        patch: on calibration texts.
        journal: records of looks that were made before; new ones are appended. A CacheError names
            a record that is damaged.
    """

    def __init__(
        self, trials: Trials, patch: QuickPatch, *, journal: Journal | None = None
    ) -> None:
        self._trials, self.patch, self._journal = trials, patch, journal
        self._looked: dict[Cut, dict[int, NDArray[np.float64]] | str] = {}
        self._failed: dict[Cut, ModelError | PatchError] = {}
        self._recalled: dict[tuple[Cut, int | None], float] = {}
        recall(journal, self._recall, "patched trials")

    def scores(self, cut: AnyCut, looks: int | None = None) -> Scores:
        """Judge a cut after a quick patch, which is solved anew if looks are missing.

        As :meth:`Trials.scores`; a PatchError says why a cut cannot be patched.
        """
        trials, gone = self._trials, _layers_of(cut)
        self.judge_together([gone], looks)
        if gone in self._failed:
            raise self._failed[gone]
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

    def judge_together(self, cuts: Iterable[AnyCut], looks: int | None = None) -> None:
        """Judge cuts after a quick patch at once, as :meth:`Trials.judge_together`."""
        trials, wanted = self._trials, map(_layers_of, cuts)
        if not trials.model.is_streamed:
            return
        known = {gone: self._looked.get(gone, {}) for gone in wanted if gone not in self._failed}
        looked = {gone: one for gone, one in known.items() if not isinstance(one, str)}
        missing = {
            gone: indices
            for gone, one in looked.items()
            if (indices := [index for index in trials.first(looks) if index not in one])
        }
        started = trials.clock()
        for gone, found in judge_patched_together(trials, self.patch, missing):
            if isinstance(found, dict):
                self._looked[gone] = {**looked[gone], **found}
                for index, sums in found.items():
                    self._note(gone, started, {"look": index, "sums": sums.tolist()})
                    started = trials.clock()
            elif stays(found):
                self._looked[gone] = str(found)
                self._note(gone, started, {"why": str(found)})
            else:
                self._failed[gone] = found
            started = trials.clock()

    def _solve(self, gone: Cut, stack: ExitStack) -> None:
        """Patch the model until the stack is closed; why that cannot be is remembered."""
        trials = self._trials
        started = trials.clock()
        trials.prepare(
            trials.first(None)
        )  # by the whole model, which there is none of from here on
        try:
            stack.enter_context(self.patch.patched(Plan.of(len(trials.model), sorted(gone))))
        except PatchError as error:
            if stays(error):
                self._looked[gone] = str(error)  # of memory there may be more another time
                self._note(gone, started, {"why": str(error)})
            raise

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

    def _note(self, gone: Cut, started: float, record: dict[str, Any]) -> None:
        if self._journal is not None:
            took = self._trials.clock() - started
            self._journal.append({"dropped": sorted(gone), **record, "seconds": took})

    def _recall(self, record: dict[str, Any]) -> None:
        gone = layers_of(record, len(self._trials.model))
        if not gone:
            raise ValueError("a patch of no cut")
        if "why" in record:
            self._looked[gone] = of_type(str, record["why"])
            self._recalled[gone, None] = seconds_of(record)
            return
        items = self._trials.judge.items
        index = look_of(record, len(items))
        looked = self._looked.setdefault(gone, {})
        if isinstance(looked, str):
            raise ValueError("a look at a cut that cannot be patched")
        looked[index] = sums_of(record, len(items[index]))
        self._recalled[gone, index] = seconds_of(record)


def kept_patched(
    trials: Trials, patch: QuickPatch, *, store: ResultStore, items: str, fitted: str
) -> PatchedTrials:
    """Patched trials that the store keeps, as :func:`kept_trials`.

    ``fitted`` identifies the calibration texts.
    """
    on = {"items": items, "fitted": fitted, **judge_inputs(trials.judge)}
    journal = store.journal("trials", {"state": "quick", **on, **patch.settings})
    return PatchedTrials(trials, patch, journal=journal)


def _layers_of(cut: AnyCut) -> Cut:
    """The layers that go by a cut; PatchError where experts go."""
    if isinstance(cut, Plan):
        refuse_experts(cut)
    return frozenset(cut.dropped if isinstance(cut, Plan) else cut)


def judge_patched_together(
    trials: Trials, patch: QuickPatch, cuts: Mapping[Cut, Sequence[int]]
) -> Iterator[tuple[Cut, Judged]]:
    """Judge cuts after a quick patch, each on some batches, while each layer is read for all.

    Gives what was found of each cut.
    """
    if not cuts:
        return
    trials.prepare({index for indices in cuts.values() for index in indices})
    patch.prepare()

    def size(cut: Cut) -> int:
        return trials.prefixes.bytes_of(cuts[cut]) + patch.bytes_of_cut

    for group in trials.prefixes.groups(cuts, size):
        yield from _run_patched(trials, patch, {cut: cuts[cut] for cut in group})


def _run_patched(
    trials: Trials, patch: QuickPatch, cuts: Mapping[Cut, Sequence[int]]
) -> Iterator[tuple[Cut, Judged]]:
    model, batches = trials.model, trials.judge.batches
    befores: dict[Place, torch.Tensor] = {}
    found: dict[Cut, Judged] = {}

    def job(cut: Cut, indices: Sequence[int]) -> Iterator[int]:
        def starts() -> list[torch.Tensor]:
            return [befores[_before(cut, index)] for index in indices]

        try:
            plan = Plan.of(len(model), sorted(cut))
            behind = yield from patch.run_cut(plan, [batches[index] for index in indices], starts)
            states = zip(indices, behind, strict=True)
            found[cut] = {index: trials.measure_states(index, one) for index, one in states}
        except torch.OutOfMemoryError as error:
            found[cut] = out_of_memory(error)
        except (PatchError, ModelError) as error:
            found[cut] = error

    places = [_before(cut, index) for cut, indices in cuts.items() for index in indices]
    with model.evaluating():
        before = trials.prefixes.job(places, befores.__setitem__)
        order = {layer for cut in cuts for layer in trials.path(cut)}
        model.in_step([before, *(job(*one) for one in cuts.items())], order)
    yield from found.items()


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
