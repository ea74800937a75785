"""Cuts judged after a quick patch, look by look."""

import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import PatchError
from ..patching.quick import QuickPatch
from ..values.plan import Plan
from ..values.schema import of_type
from ..values.scores import Scores
from .trials import Journal, Trials, recall
from .work import Meter, Work


@dataclass(slots=True)
class _Looked:
    """A cut so far: where its patch begins, what that took, and its scores look by look."""

    unchanged: int
    layer_forwards: int
    seconds: float
    sums: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)


class PatchedTrials:
    """Cuts of one model, each judged after a quick patch on the items of its trials.

    Args:
        trials: of the same model as it is cut; they judge, and know the states before a patch.
        patch: on texts that fit.
        num_texts: how many those are.
        meter: whose accounts are charged: for the whole model's states on the texts that fit
            once, and for each cut as if it had been made there.
        journal: records of looks that were made before; new ones are appended.

    Attributes:
        num_texts: texts that each patch is fitted on.

    Raises:
        CacheError: a record of the journal is none of such a look.
    """

    def __init__(
        self,
        trials: Trials,
        patch: QuickPatch,
        *,
        num_texts: int,
        meter: Meter,
        journal: Journal | None = None,
    ) -> None:
        self._trials, self._patch, self._meter = trials, patch, meter
        self.num_texts, self._whole = num_texts, len(trials.model) * num_texts
        self._journal = journal
        self._looked: dict[frozenset[int], _Looked | str] = {}
        recall(journal, self._recall, "patched trials")

    def scores(self, dropped: Iterable[int], looks: int | None = None) -> Scores:
        """Judge a cut after a quick patch, which is solved anew if looks are missing.

        Args:
            dropped: the layers that the model is without, one at least.
            looks: judge the items of the first so many batches only.

        Returns:
            The scores by item, NaN for those that were not looked at.

        Raises:
            PatchError: the cut cannot be patched.
            ModelError: a score is not finite.
        """
        trials, gone = self._trials, frozenset(dropped)
        wanted = range(trials.num_looks if looks is None else min(looks, trials.num_looks))
        looked = self._looked.get(gone)
        if isinstance(looked, str):
            raise PatchError(looked)
        if looked is None or any(index not in looked.sums for index in wanted):
            with self._meter.account(), ExitStack() as stack:  # charged below, not as it passes
                looked = self._solve(gone, stack)
                for index in wanted:
                    if index not in looked.sums:
                        self._measure(gone, looked, index)
        sums = np.full(trials.judge.num_items, np.nan)
        for index in wanted:
            self._charge(gone, looked, index)
            sums[trials.judge.items[index]] = looked.sums[index]
        return Scores(sums, trials.judge.weights)

    def _solve(self, gone: frozenset[int], stack: ExitStack) -> _Looked:
        """Patch the model until the stack is closed; what it takes is noted the first time."""
        trials = self._trials
        for index in range(trials.num_looks):
            trials.prepare(index)  # by the whole model, which there is none of from here on
        plan = Plan.of(len(trials.model), sorted(gone))
        with self._meter.account() as work:
            started = time.perf_counter()
            self._patch.prepare()
            whole = work.layer_forwards
            try:
                fits = stack.enter_context(self._patch.patched(plan))
            except PatchError as error:
                if not isinstance(error.__cause__, torch.OutOfMemoryError):
                    self._note(gone, {"why": str(error)})
                raise
            looked = self._looked.get(gone)
            if not isinstance(looked, _Looked):
                ran, seconds = work.layer_forwards - whole, time.perf_counter() - started
                self._looked[gone] = looked = _Looked(fits.layers[0], ran, seconds)
        return looked

    def _measure(self, gone: frozenset[int], looked: _Looked, index: int) -> None:
        started = time.perf_counter()
        sums = self._trials.judge_changed(gone, index, unchanged=looked.unchanged)
        looked.sums[index], looked.times[index] = sums, time.perf_counter() - started
        self._note(gone, {
            "look": index, "sums": sums.tolist(), "seconds": looked.times[index],
            "unchanged": looked.unchanged, "layer_forwards": looked.layer_forwards,
            "patch_seconds": looked.seconds,
        })  # fmt: skip

    def _charge(self, gone: frozenset[int], looked: _Looked, index: int) -> None:
        """Charge the open account for a look, and for the patch before it."""
        meter, trials = self._meter, self._trials
        meter.charge(("patch", id(self)), Work(self._whole))
        meter.charge(("patch", id(self), gone), Work(looked.layer_forwards, looked.seconds))
        trials.charge_states(index, looked.unchanged)
        layers = sum(layer >= looked.unchanged for layer in trials.path(gone))
        ran = layers * len(trials.judge.batches[index])
        meter.charge(("patch", id(self), gone, index), Work(ran, looked.times[index]))

    def _note(self, gone: frozenset[int], record: dict[str, Any]) -> None:
        if "why" in record:
            self._looked[gone] = record["why"]
        if self._journal is not None:
            self._journal.append({"dropped": sorted(gone), **record})

    def _recall(self, record: dict[str, Any]) -> None:
        layers = [of_type(int, layer) for layer in of_type(list, of_type(dict, record)["dropped"])]
        size, items = len(self._trials.model), self._trials.judge.items
        if not layers or layers != sorted(set(layers) & set(range(size))):
            raise ValueError(f"layers {layers} of {size}")
        gone = frozenset(layers)
        if "why" in record:
            self._looked[gone] = of_type(str, record["why"])
            return
        index, begin = of_type(int, record["look"]), of_type(int, record["unchanged"])
        if not 0 <= index < len(items) or not 0 <= begin < size:
            raise ValueError(f"look {index} of {len(items)}, from layer {begin} of {size}")
        sums = [of_type(float, value) for value in of_type(list, record["sums"])]
        if len(sums) != len(items[index]):
            raise ValueError(f"{len(sums)} scores of {len(items[index])} items")
        ran = of_type(int, record["layer_forwards"])
        times = [of_type(float, record[name]) for name in ("seconds", "patch_seconds")]
        if not all(map(math.isfinite, [*sums, *times])) or min(ran, *times) < 0:
            raise ValueError("a number is not finite, or negative")
        looked = self._looked.setdefault(gone, _Looked(begin, ran, times[1]))
        if isinstance(looked, str):
            raise ValueError("a look at a cut that cannot be patched")
        looked.sums[index], looked.times[index] = np.array(sums), times[0]
