"""HeldOutCuts: cuts of one model on the texts that report, which no criterion has seen."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PatchError
from ..memory.weights import num_parameters
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..values.comparison import ComparedModel
from ..values.loss import Loss
from ..values.plan import Plan
from ..values.schema import finite
from ..values.scores import Scores
from .judges.judge import Judge, LossJudge
from .patched_trials import judge_patched_together, stays
from .trials import ResultStore, Trials

TRUTH_ITEMS = 32
"""Texts on which the true losses without single layers are measured, at most."""


def judge_inputs(judge: Judge) -> dict[str, Any]:
    """What the records of a judge's trials depend on beside the model and the items."""
    return {"judge": judge.name, "looks": [len(items) for items in judge.items]}


class HeldOutCuts:
    """The losses and scores of cuts on the texts that report.

    Args:
        model: the whole model.
        losses: the next-token loss of the texts that report.
        judge: on items that report; the same as ``losses`` if the loss judges.
        store: results that were measured before.
        texts: identity of the texts that report, for the store.
        num_rejected: texts with fewer than two tokens.

    Attributes:
        is_complete: whether nothing was left out for want of memory.
    """

    def __init__(
        self,
        model: Layerwise,
        losses: LossJudge,
        judge: Judge,
        *,
        store: ResultStore,
        texts: str,
        num_rejected: int = 0,
    ) -> None:
        self.model, self.store, self.texts = model, store, texts
        self._num_rejected = num_rejected
        self.is_complete = True
        self._single_layers: tuple[float, ...] | None = None
        self._patched: dict[tuple[str, tuple[int, ...], int], Scores | str] = {}
        self.losses = self._trials(losses)
        self.scores = self.losses if judge is losses else self._trials(judge)

    def _trials(self, judge: Judge) -> Trials:
        journal = self.store.journal("trials", {"items": self.texts, **judge_inputs(judge)})
        return Trials(self.model, judge, journal=journal)

    def compared(self, name: str) -> ComparedModel:
        """Measure the whole model, which has that name."""
        judge, decoder = self.scores.judge, self.model.head.decoder
        return ComparedModel(
            name,
            len(self.model),
            self.loss(self.losses.scores(())),
            self._single_layers or (),
            chance=judge.chance,
            accuracy=judge.accuracy(self.scores.scores(()).sums),
            dtype=decoder.identity.dtype,
            parameters=num_parameters(decoder.model),
        )

    def loss(self, scores: Scores) -> Loss:
        """Give the scores of all texts that report, by :class:`LossJudge`, as a loss."""
        return _as_loss(scores, self.model, self._num_rejected)

    def single_layers(self) -> tuple[float, ...]:
        """Measure the true loss without each single layer, (L,) nats a token.

        It is on the first batches of at least ``TRUTH_ITEMS`` texts.
        """
        if self._single_layers is not None:
            return self._single_layers
        looks = self.losses.looks_at(TRUTH_ITEMS)
        layers = range(len(self.model))
        self.losses.judge_together([(layer,) for layer in layers], looks)
        means = (self.losses.scores((layer,), looks).mean for layer in layers)
        self._single_layers = tuple(means)
        return self._single_layers

    def patched(
        self, patch: QuickPatch, plan: Plan, *, fitted: str, looks: int | None = None
    ) -> Scores | str:
        """Measure the loss of a cut after a quick patch, on the first ``looks`` batches or all.

        ``fitted`` is the identity of the texts that the patch is fitted on, for the store. Gives
        the scores by text, NaN for those that were not looked at; a sentence that says why where
        the cut cannot be patched.
        """
        looks = len(self.losses.first(looks))
        key = fitted, plan.dropped, looks
        if key not in self._patched:
            self._patched[key] = self._measure_patched(patch, plan, fitted, looks)
        return self._patched[key]

    def _measure_patched(
        self, patch: QuickPatch, plan: Plan, fitted: str, looks: int
    ) -> Scores | str:
        texts = {"fitted": fitted, "items": self.texts, "looks": looks}
        inputs = {"dropped": list(plan.dropped), **texts, **patch.settings}
        found = self.store.get("patched", inputs)
        if found is None:
            try:
                sums = self._judged(patch, plan, looks)
                found = {"sums": [finite(float(value)) for value in sums]}
            except PatchError as error:
                if not stays(error):
                    self.is_complete = False
                    return str(error)
                found = {"why": str(error)}
            self.store.put("patched", inputs, found)
        if "why" in found:
            return str(found["why"])
        return Scores(np.array(found["sums"], np.float64), self.losses.judge.weights)

    def _judged(self, patch: QuickPatch, plan: Plan, looks: int) -> NDArray[np.float64]:
        """Judge a cut after a quick patch by the first looks."""
        trials, sums = self.losses, np.full(self.losses.judge.num_items, np.nan)
        if trials.is_streamed:
            wanted = {frozenset(plan.dropped): range(looks)}
            ((_, found),) = judge_patched_together(trials, patch, wanted)
            if not isinstance(found, dict):
                raise found
            for index, judged in found.items():
                sums[trials.judge.items[index]] = judged
            return sums
        with patch.patched(plan) as fits:
            for index, items in enumerate(trials.judge.items[:looks]):
                unchanged = fits.layers[0]
                sums[items] = trials.judge_changed(plan.dropped, index, unchanged=unchanged)
        return sums


def loss_as_it_is(model: Layerwise, judge: LossJudge, *, num_rejected: int) -> Loss:
    """Measure the loss of a model with the layers that it has now: cut, patched or healed maybe.

    ``num_rejected`` texts have fewer than two tokens.
    """
    return _as_loss(Trials(model, judge).scores(()), model, num_rejected)


def _as_loss(scores: Scores, model: Layerwise, num_rejected: int) -> Loss:
    weights = int(scores.weights.sum())
    counts = weights, len(scores), num_rejected, model.head.vocab_size
    return Loss(scores.mean, scores.stderr, *counts, by_text=scores)
