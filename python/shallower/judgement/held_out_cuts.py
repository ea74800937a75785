"""HeldOutCuts: cuts of one model on the test texts, which no criterion has seen."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.loss import measure_loss, out_of_domain_texts
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..results.comparison import ComparedModel
from ..results.loss import Loss
from ..results.scores import Scores
from ..texts.sources import OWN_TOKENS
from ..values.entries import ResultStore
from ..values.plan import Plan
from ..values.tokens import Tokens
from .judges.judge import Judge, LossJudge
from .patched_trials import PatchedTrials, kept_patched
from .trials import kept_trials

TRUTH_ITEMS = 32
"""Texts on which the true losses without single layers are measured, at most."""


class HeldOutCuts:
    """The losses and scores of cuts of ``model`` on the test texts.

    ``losses`` and ``judge`` are one if the loss judges; ``texts`` is the identity of the test
    texts, of which ``num_rejected`` have fewer than two tokens.
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

    def described(self, name: str) -> ComparedModel:
        """Describe the whole model, which has that name, without a measurement."""
        decoder = self.model.head.decoder
        of: Any = {"dtype": decoder.identity.dtype, "parameters": num_parameters(decoder.model)}
        return ComparedModel(name, len(self.model), None, **of)

    def compared(self, name: str) -> ComparedModel:
        """Measure the whole model, which has that name."""
        judge = self.scores.judge
        return replace(
            self.described(name),
            whole=self.loss(self.losses.scores(())),
            single_layers=self._single_layers or (),
            chance=judge.chance,
            accuracy=judge.accuracy(self.scores.scores(()).sums),
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
    """Add the loss of a state of a model on our own texts, where its tokenizer has their words.

    The model is without what ``plan`` drops; ``store`` has results of the whole one.
    """
    tokens = replace(tokens, max_length=min(tokens.max_length, OWN_TOKENS))
    texts, decoder = out_of_domain_texts(tokenizer, tokens.max_length), Decoder.of(model)
    if not texts:
        return {}
    how: Any = {"tokens": tokens, "plan": plan, "store": store, "progress": progress}
    loss = measure_loss(decoder, tokenizer, texts, description="loss out of domain", **how)
    return {**losses, state: replace(loss, bytes_by_text=None)}
