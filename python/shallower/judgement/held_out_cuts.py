"""HeldOutCuts: cuts of one model on the test texts, which no criterion has seen."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.batches import batches_of_texts
from ..evaluation.loss import fitting_tokens, out_of_domain_texts
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..texts.sources import OWN_TOKENS
from ..values.comparison import ComparedModel
from ..values.hashing import hash_of
from ..values.loss import Loss
from ..values.plan import Plan
from ..values.scores import Scores
from ..values.tokens import Tokens
from .forwards import scores_by_forwards
from .judges.judge import Judge, LossJudge
from .patched_trials import PatchedTrials, kept_patched
from .trials import ResultStore, kept_trials, trials_journal

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


def out_of_domain(
    losses: Mapping[str, Loss],
    state: str,
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    plan: Plan | None = None,
    store: ResultStore | None = None,
    progress: bool | None = None,
) -> dict[str, Loss]:
    """Add the loss of a state of a model, without what a plan drops, on our own texts.

    There are none, of any state, where the tokenizer has no words of these texts.
    ``store`` has results of the whole model.
    """
    tokens = replace(tokens, max_length=min(tokens.max_length, OWN_TOKENS))
    texts, decoder = out_of_domain_texts(tokenizer, tokens.max_length), Decoder.of(model)
    if not texts:
        return {}
    batches = batches_of_texts(tokenizer, texts, fitting_tokens(decoder, tokens), count_bytes=False)
    judge, items = LossJudge(batches.numbered), hash_of([texts, asdict(tokens)])
    journal = store and trials_journal(judge, store=store, items=items)
    how: Any = {"journal": journal, "name": "loss out of domain", "progress": progress}
    return {**losses, state: batches.loss(*scores_by_forwards(decoder, judge, plan, **how))}
