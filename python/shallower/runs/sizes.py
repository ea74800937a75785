"""Sizes: the verified plan of every number of layers, and what it costs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial

from transformers import PreTrainedTokenizerBase

from ..errors import PatchError
from ..judgement.choosing_size import SizeChoice, choose_size, require_possible
from ..judgement.held_out_cuts import HeldOutCuts, Store
from ..judgement.verifying import Verifier, verifier_of
from ..memory.sizes import num_parameters
from ..models.decoder import Decoder
from ..savings.roofline import cost_by_layer
from ..scanning.scan import Scan
from ..values.layers import deepest_block
from ..values.plan import Plan
from ..values.recommendation import SizeRow
from ..values.scores import Difference, Scores
from ..values.tokens import Tokens
from ..values.verification import Verified
from .asked import Asked

VERIFYING_TEXTS = 64
"""Texts that proposals are measured and quick patches are solved on, at most."""


TABLE_TEXTS = 32
"""Texts that choose the cuts of the table that are told beside the recommended one."""

TABLE_REPORTS = 64
"""Texts of those that report on which these cuts are measured, at least; their losses on all are
estimated by what the whole model loses on the others.
"""


class Sizes:
    """The verified plans of one model by the number of layers that go, each found when asked for.

    Args:
        decoder: the whole model, which is as before afterwards.
        tokenizer: its tokenizer.
        asked: what is asked for.
        scanned: gives the scan of the model, whose best blocks are proposals.
        referee: the model on the texts that report.
        tokens: length of texts, and how many make one forward.
        store: what was measured before, and where results are kept as they are found.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        asked: Asked,
        *,
        scanned: Callable[[], Scan],
        referee: HeldOutCuts,
        tokens: Tokens,
        store: Store,
    ) -> None:
        self._decoder, self._asked, self._scanned, self._referee = decoder, asked, scanned, referee
        self._verifier_of = partial(
            verifier_of,
            decoder,
            tokenizer,
            store=store,
            texts=asked.identities[0],
            tokens=tokens,
            top=asked.top,
            after="patch",
            max_blocks=asked.blocks,
            seed=asked.seed,
            progress=asked.progress,
        )
        self._splits = replace(asked.splits, fit=asked.splits.fit[:VERIFYING_TEXTS])
        self.verifier: Verifier = self._verifier_of(self._splits)
        self._verified: dict[int, Verified] = {}

    def verify(self, n: int) -> Verified:
        """Find the best plan of one size.

        Args:
            n: layers that go.

        Returns:
            The race of the proposals, as they are cut where none can be patched.
        """
        if n not in self._verified:
            self._verified[n] = self._best(self.verifier, n)
        return self._verified[n]

    @cached_property
    def _in_passing(self) -> Verifier:
        """One that judges on fewer texts, for what is told beside the recommended cut."""
        if len(self._splits.choose) <= TABLE_TEXTS:
            return self.verifier
        few = replace(self._splits, choose=self._splits.choose[:TABLE_TEXTS])
        return self._verifier_of(few)

    def _best(self, verifier: Verifier, n: int) -> Verified:
        try:
            return self._raced(verifier, n)
        except PatchError:  # there may be no way to patch models of this family
            return self._raced(replace(verifier, after="none"), n)

    def _raced(self, verifier: Verifier, n: int) -> Verified:
        best = self._scanned().best_blocks(n, self._asked.top)
        return verifier.verify(n, more=[Plan.of(len(self._decoder), [block]) for block in best])

    def require_possible(self) -> None:
        """Refuse a target that no cut can do, as far as sizes alone tell it.

        Raises:
            LayersError, PlanError, ModelError: as :func:`require_possible`; the model cannot be
                counted, or has learned fewer positions than the context of the target.
        """
        require_possible(self._asked.target, len(self._decoder), self._left_at_least)

    def _left_at_least(self, n: int) -> float:
        whole, of_layers = self._cost_by_layer
        return whole - sum(sorted(of_layers)[len(of_layers) - n :])

    def choose(self) -> tuple[SizeChoice, set[int]]:
        """Find how many layers are to go.

        Returns:
            The number, and the sizes that were looked at for it.

        Raises:
            LayersError, PlanError: as :func:`choose_size`.
        """
        whole, of_layers = self._cost_by_layer

        def left(n: int) -> float:
            return whole - sum(of_layers[layer] for layer in self.verify(n).plan.dropped)

        found = choose_size(
            self._asked.target, len(self._decoder), lost=self.lost, left=left,
            left_at_least=self._left_at_least,
        )  # fmt: skip
        return found, {found.n, *self._verified}

    def lost(self, n: int) -> Difference:
        """Tell what ``n`` layers less cost after a quick patch, on the texts that choose.

        Args:
            n: layers that go.

        Returns:
            The paired difference to the whole model; of the bare cut where it cannot be patched.
        """
        verifier, dropped = self.verifier, self.verify(n).plan.dropped
        try:
            scores = verifier.scores(dropped, after="patch")
        except PatchError:
            scores = verifier.scores(dropped, after="none")
        return scores.minus(verifier.scores((), after="none"))

    @cached_property
    def _cost_by_layer(self) -> tuple[float, Sequence[float]]:
        """What the whole model takes, and each layer of it, in the unit of the target."""
        target = self._asked.target
        if target.latency is not None or target.memory is not None:
            return cost_by_layer(self._decoder, target)
        return self._num_parameters, self._of_layers

    @cached_property
    def _num_parameters(self) -> int:
        return num_parameters(self._decoder.model)

    @cached_property
    def _of_layers(self) -> list[int]:
        """The parameters of every layer."""
        return [num_parameters(layer) for layer in self._decoder.layers.modules]

    def _gone(self, dropped: Iterable[int]) -> int:
        return sum(self._of_layers[layer] for layer in dropped)

    def share(self, dropped: Sequence[int]) -> float:
        """Tell which share of the parameters goes with some layers.

        Args:
            dropped: their indices.

        Returns:
            Their parameters as a share of all.
        """
        return self._gone(dropped) / self._num_parameters

    def row(self, n: int, whole: Scores, *, in_passing: bool) -> SizeRow:
        """Measure a size on the texts that report, and the deepest layers beside it.

        Args:
            n: layers that go.
            whole: the scores of the whole model.
            in_passing: race the proposals and measure the cuts on fewer texts, as nothing is
                decided by this size.

        Returns:
            A row of the table.
        """
        losses = self._referee.losses
        verified = self._best(self._in_passing, n) if in_passing else self.verify(n)
        dropped = verified.plan.dropped
        deepest = Plan(len(self._decoder), (deepest_block(len(self._decoder), n),), "deepest")
        looks = losses.looks_at(TABLE_REPORTS) if in_passing else None
        cut, bottom = (losses.scores(one, looks) for one in (dropped, deepest.dropped))
        patched, bottom_patched = (self._patched(one, looks) for one in (verified.plan, deepest))
        (cut_loss, cut_error), lost = cut.estimated_by(whole), cut.minus(whole)
        deepest_loss, deepest_error = bottom.estimated_by(whole)
        patched_loss, patched_error = _estimated(patched, whole)
        kept = None if patched is None else patched.minus(whole)
        return SizeRow(
            n=n, dropped=dropped, cut=cut_loss, stderr=cut_error, lost=lost.mean,
            lost_stderr=lost.stderr, num_texts=len(cut),
            patched=patched_loss, patched_stderr=patched_error,
            patched_lost=None if kept is None else kept.mean,
            patched_lost_stderr=None if kept is None else kept.stderr,
            deepest=deepest_loss, deepest_stderr=deepest_error,
            deepest_patched=_estimated(bottom_patched, whole)[0],
            layers_share=n / len(self._decoder), parameters_share=self.share(dropped),
            num_tied=len(verified.tied),
            layer_forwards=verified.layer_forwards, seconds=verified.seconds,
        )  # fmt: skip

    def _patched(self, plan: Plan, looks: int | None) -> Scores | None:
        """The scores after a quick patch; None for what cannot be patched."""
        fitted = self._asked.identities[0]
        found = self._referee.patched(self.verifier.patch, plan, fitted=fitted, looks=looks)
        return found if isinstance(found, Scores) else None


def _estimated(scores: Scores | None, whole: Scores) -> tuple[float | None, float | None]:
    return (None, None) if scores is None else scores.estimated_by(whole)
