"""HeldOutCuts: cuts of one model on the test texts, which no criterion has seen."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import ModelError, PatchError
from ..memory.weights import num_parameters
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..values.comparison import ComparedModel
from ..values.loss import Loss
from ..values.plan import Plan
from ..values.schema import finite
from ..values.scores import Scores
from .judges.judge import Judge, LossJudge
from .patched_trials import Judged, judge_patched_together, stays
from .trials import ResultStore, Trials

TRUTH_ITEMS = 32
"""Texts on which the true losses without single layers are measured, at most."""


def judge_inputs(judge: Judge) -> dict[str, Any]:
    """What the records of a judge's trials depend on beside the model and the items."""
    content = {"content": judge.content} if judge.content else {}
    return {"judge": judge.name, "looks": [len(items) for items in judge.items], **content}


class HeldOutCuts:
    """The losses and scores of cuts on the test texts.

    Args:
        model: the whole model.
        losses: the next-token loss of the test texts.
        judge: on test items; the same as ``losses`` if the loss judges.
        store: cached results.
        texts: identity of the test texts, for the store.
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
        self._patched: dict[tuple[str, tuple[int, ...], int], Scores | str | ModelError] = {}
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
        """Give the scores of all test texts, by :class:`LossJudge`, as a loss."""
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
        """Measure a cut after a quick patch on the first ``looks`` batches or all.

        ``fitted`` identifies the calibration texts. Gives scores by text, NaN where not measured,
        or a sentence that says why not.
        """
        self._patch_all(patch, [plan], fitted, looks)
        found = self._patched[fitted, plan.dropped, len(self.losses.first(looks))]
        if isinstance(found, ModelError):
            raise found
        return found

    def patch_together(self, patch: QuickPatch, plans: Iterable[Plan], *, fitted: str) -> None:
        """Judge cuts after their quick patches at once, where each layer is read for all of them.

        As :meth:`Trials.judge_together`; :meth:`patched` gives what was found.
        """
        if self.losses.is_streamed:
            self._patch_all(patch, plans, fitted, None)

    def _patch_all(
        self, patch: QuickPatch, plans: Iterable[Plan], fitted: str, looks: int | None
    ) -> None:
        """Note what is known of cuts after a quick patch, and judge the others."""
        count = len(self.losses.first(looks))
        texts = {"fitted": fitted, "items": self.texts, "looks": count, **patch.settings}
        missing: dict[frozenset[int], Plan] = {}
        for plan in plans:
            key = fitted, plan.dropped, count
            if key not in self._patched:
                known = self.store.get("patched", {"dropped": list(plan.dropped), **texts})
                if known is None:
                    missing[frozenset(plan.dropped)] = plan
                else:
                    self._patched[key] = self._read(known)
        for cut, judged in self._judged(patch, missing, range(count)):
            dropped = missing[cut].dropped
            found = self._noted(judged, {"dropped": list(dropped), **texts})
            self._patched[fitted, dropped, count] = found

    def _noted(self, judged: Judged, inputs: dict[str, Any]) -> Scores | str | ModelError:
        """Keep what a cut came to after a quick patch, unless it may be otherwise next time."""
        if isinstance(judged, ModelError):
            return judged
        if isinstance(judged, PatchError):
            if not stays(judged):
                self.is_complete = False
                return str(judged)
            record: dict[str, Any] = {"why": str(judged)}
        else:
            sums = np.full(self.losses.judge.num_items, np.nan)
            for index, part in judged.items():
                sums[self.losses.judge.items[index]] = part
            record = {"sums": [finite(float(value)) for value in sums]}
        self.store.put("patched", inputs, record)
        return self._read(record)

    def _read(self, record: Mapping[str, Any]) -> Scores | str:
        if "why" in record:
            return str(record["why"])
        return Scores(np.array(record["sums"], np.float64), self.losses.judge.weights)

    def _judged(
        self, patch: QuickPatch, plans: Mapping[frozenset[int], Plan], looks: range
    ) -> Iterator[tuple[frozenset[int], Judged]]:
        """Judge cuts after a quick patch by some looks."""
        trials = self.losses
        if trials.is_streamed:
            yield from judge_patched_together(trials, patch, dict.fromkeys(plans, looks))
            return
        for cut, plan in plans.items():
            try:
                with patch.patched(plan) as fits:
                    first = fits.layers[0]
                    found: Judged = {
                        index: trials.judge_changed(plan.dropped, index, unchanged=first)
                        for index in looks
                    }
            except (PatchError, ModelError) as error:
                found = error
            yield cut, found


def scores_as_it_is(model: Layerwise, judge: Judge) -> Scores:
    """Judge a model with the layers and weights that it has now; a CriterionError says that the
    judge needs the whole model's states, and trials of that one have not prepared it.
    """
    return Trials(model, judge, prepared=True).scores(())


def loss_as_it_is(model: Layerwise, judge: LossJudge, *, num_rejected: int) -> Loss:
    """Measure the loss of a model with the layers that it has now: cut, patched or healed maybe.

    ``num_rejected`` texts have fewer than two tokens.
    """
    return _as_loss(scores_as_it_is(model, judge), model, num_rejected)


def _as_loss(scores: Scores, model: Layerwise, num_rejected: int) -> Loss:
    weights = int(scores.weights.sum())
    counts = weights, len(scores), num_rejected, model.head.vocab_size
    return Loss(scores.mean, scores.stderr, *counts, by_text=scores)
