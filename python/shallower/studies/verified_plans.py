"""The verified plan of every number of layers that go, and that number by a target."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import PatchError
from ..judgement.choosing_size import SizeChoice, choose_size, require_possible
from ..judgement.judges.judge import Judge
from ..judgement.verifying import Verifier
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..results.scores import Difference
from ..results.verification import Verified
from ..savings.roofline import cost_by_layer
from ..scanning.scan import Scan
from ..settings.target import Target
from ..texts.batches import TokenisedText
from ..texts.splits import Splits
from ..values.entries import ResultStore
from ..values.plan import Plan
from ..values.tokens import Tokens
from .study import Study

VERIFYING_TEXTS = 64
"""Texts that proposals are measured and quick patches are solved on, at most."""


class VerifiedPlans:
    """The best plans of one model by the number of layers that go, each found when it is needed.

    The model is as before afterwards; ``scanned`` gives the scan whose best blocks are proposals.
    """

    def __init__(
        self,
        study: Study[Any],
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits[TokenisedText],
        *,
        fitted: str,
        scanned: Callable[[], Scan],
        judge: Judge,
        tokens: Tokens,
        store: ResultStore,
    ) -> None:
        self._decoder, self._scanned, self._settings = decoder, scanned, study.settings
        self.fitted = fitted
        self.verifier = Verifier(
            decoder,
            tokenizer,
            replace(splits, fit=splits.fit[:VERIFYING_TEXTS]),
            store=store,
            texts=self.fitted,
            tokens=tokens,
            top=self._settings.top,
            after=study.settings.after,
            max_blocks=getattr(self._settings, "blocks", None),
            seed=self._settings.seed,
            progress=study.progress,
            judge=judge,
        )
        self.found: dict[int, Verified] = {}
        self._counted: dict[Target, tuple[float, Sequence[float]]] = {}

    def verify(self, n: int) -> Verified:
        """Race the proposals of one size, as cut if none is to be, or can be, patched quickly."""
        if n not in self.found:
            self.found[n] = self._best(n)
        return self.found[n]

    def _best(self, n: int) -> Verified:
        best = self._scanned().best_blocks(n, self._settings.top)
        more = [Plan.of(len(self._decoder), [block]) for block in best]
        try:
            return self.verifier.verify(n, more=more)
        except PatchError:  # there may be no way to patch models of this family
            return self.verifier.verify(n, more=more, after="none")

    def lost(self, n: int) -> Difference:
        """Compare ``n`` layers less with the whole model, on the selection set.

        After a quick patch; of the bare cut where it cannot be patched, or is not to be.
        """
        verifier, plan = self.verifier, self.verify(n).plan
        try:
            scores = verifier.scores(plan, after=verifier.after)
        except PatchError:
            scores = verifier.scores(plan, after="none")
        return scores.minus(verifier.scores((), after="none"))

    # How many layers are to go.
    def require_possible(self, target: Target) -> None:
        """Refuse a target that sizes show no cut can reach, as :func:`require_possible`.

        ModelError if the model cannot be counted, or the context exceeds its positions.
        """
        require_possible(target, len(self._decoder), partial(self._left_at_least, target))

    def choose(self, target: Target) -> SizeChoice:
        """Find how many layers are to go.

        Raises as :func:`choose_size`.
        """
        whole, of_layers = self._resources(target)

        def left(n: int) -> float:
            return whole - sum(of_layers[layer] for layer in self.verify(n).plan.dropped)

        return choose_size(
            target,
            len(self._decoder),
            lost=self.lost,
            left=left,
            left_at_least=partial(self._left_at_least, target),
        )

    def _left_at_least(self, target: Target, n: int) -> float:
        whole, of_layers = self._resources(target)
        return whole - sum(sorted(of_layers)[len(of_layers) - n :])

    def _resources(self, target: Target) -> tuple[float, Sequence[float]]:
        """What the whole model takes, and each layer of it, in the unit of the target."""
        if target not in self._counted:
            self._counted[target] = _count(self._decoder, target)
        return self._counted[target]


def _count(decoder: Decoder, target: Target) -> tuple[float, Sequence[float]]:
    if target.latency is not None or target.memory is not None:
        return cost_by_layer(decoder, target)
    layers = decoder.layers.modules
    return num_parameters(decoder.model), [num_parameters(layer) for layer in layers]
