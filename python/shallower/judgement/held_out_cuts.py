"""HeldOutCuts: cuts of one model on the test texts, which no criterion has seen."""

from ..memory.weights import num_parameters
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..values.comparison import ComparedModel
from ..values.loss import Loss
from ..values.scores import Scores
from .judges.judge import Judge, LossJudge
from .patched_trials import PatchedTrials, kept_patched
from .trials import ResultStore, kept_trials

TRUTH_ITEMS = 32
"""Texts on which the true losses without single layers are measured, at most."""


class HeldOutCuts:
    """The losses and scores of cuts on the test texts.

    Args:
        model: the whole model.
        losses: the next-token loss of the test texts.
        judge: on test items; the same as ``losses`` if the loss judges.
        store: cached results.
        texts: identity of the test texts, for the store.
        num_rejected: texts with fewer than two tokens.
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
        self._single_layers: tuple[float, ...] | None = None
        self.losses = kept_trials(model, losses, store=store, items=texts)
        self.scores = self.losses
        if judge is not losses:
            self.scores = kept_trials(model, judge, store=store, items=texts)

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
        size = self.model.head.vocab_size
        return Loss.of_scores(scores, num_rejected=self._num_rejected, vocab_size=size)

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

    def after(self, patch: QuickPatch, *, fitted: str) -> PatchedTrials:
        """The losses of cuts after a quick patch; ``fitted`` identifies the calibration texts."""
        return kept_patched(self.losses, patch, store=self.store, items=self.texts, fitted=fitted)
