"""Verification: proposals of several criteria, raced by a judge, as they are cut or patched."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import CacheError, LayersError, PlanError, TextsError
from ..evaluation.loss import fitting_tokens
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..progress import track
from ..texts.batches import TokenBatches
from ..texts.splits import FEWEST_CHOOSING, FEWEST_FITTING, Splits
from ..values.layers import check_size, ranges
from ..values.plan import Plan
from ..values.scores import Scores
from ..values.tokens import Tokens
from ..values.verification import AFTER, Verified
from .comparing import judge_of
from .held_out_cuts import Store, judge_inputs
from .patched_trials import PatchedTrials
from .proposals import PROPOSERS, Cut, Proposals
from .subject import Subject
from .token_states import evenly
from .tournament import Tournament
from .trials import Trials
from .work import Meter

PATCH_TEXTS = 24
"""Texts that quick patches are fitted on, evenly over those that fit."""


@dataclass
class Verifier:
    """Proposals of several criteria for one model that is loaded, and a judge that races them.

    Attributes:
        subject: the model, the texts that fit and those that choose.
        patch: the quick patch on texts that fit.
        patched: cuts judged after it.
        store: what was measured before, and where results are kept as they are found.
        texts: identity of the texts that fit and choose, for the store.
        top: the best so many blocks of each criterion are proposals, and twice as many cuts
            come into the last race.
        after: when proposals are judged: ``none``, as they are cut; ``patch``, after a quick patch.
        max_blocks: blocks of a cut at most; None for no limit.
        progress: bars with ETA on standard error; by default if that is a terminal.
    """

    subject: Subject
    patch: QuickPatch
    patched: PatchedTrials
    store: Store
    texts: str
    top: int = 4
    after: str = "patch"
    max_blocks: int | None = None
    progress: bool | None = None

    @property
    def num_layers(self) -> int:
        """L, the layers of the model."""
        return self.subject.num_layers

    @property
    def trials(self) -> Trials:
        """Cuts judged as they are, on the texts that choose."""
        return self.subject.trials

    @property
    def meter(self) -> Meter:
        """The accounts of work."""
        return self.subject.meter

    def scores(self, dropped: Iterable[int], *, after: str) -> Scores:
        """Judge a cut on all items that choose.

        Args:
            dropped: the layers that go.
            after: ``none``, as it is cut; ``patch``, after a quick patch.

        Returns:
            The scores by item.

        Raises:
            LayersError: the model has no such layer.
            PatchError: the cut cannot be patched.
            ModelError: a score is not finite.
        """
        if after not in AFTER:
            raise PlanError(f"unknown after {after!r}: expected {' or '.join(AFTER)} (--after)")
        cut = frozenset(dropped)
        return self.trials.scores(cut) if after == "none" else self.patched.scores(cut)

    def verify(self, n: int, *, base: Collection[int] = (), more: Iterable[Plan] = ()) -> Verified:
        """Find the best cut of one size.

        Args:
            n: layers that go, with those of ``base``.
            base: layers that are gone already: every proposal contains them.
            more: further proposals, of whoever made them.

        Returns:
            The winner, and the others that came into the race. Where proposals are judged after a
            patch, of those within one paired standard error of the best the one that loses least
            as it is cut, on the first of the texts: so the plan is good both ways.

        Raises:
            LayersError: a size that the model cannot lose, or a proposal of another size.
            PlanError: a proposal for another number of layers.
            PatchError: no proposal can be patched.
            ModelError: no proposal can be judged.
        """
        check_size(self.num_layers, n)
        gone = frozenset(base)
        if len(gone) >= n or not gone <= set(range(self.num_layers)):
            raise LayersError(
                f"base {sorted(gone)}: expected fewer than n = {n} layers of "
                f"0 .. {self.num_layers - 1}"
            )
        proposals = Proposals(max_blocks=self.max_blocks)
        for plan in more:
            _take(proposals, Plan.of(self.num_layers, plan), n, gone)
        inputs = self._inputs(n, gone, proposals)
        known = self.store.get("verified", inputs)
        if known is not None:
            return _recalled(known)
        with (
            track(f"verify n = {n}", None, self.progress) as advance,
            self.meter.account() as work,
        ):
            found = Tournament(
                self.subject, self.patched, self.store, self.texts, n, gone, top=self.top,
                after=self.after, proposals=proposals, work=work, advance=advance,
            ).run()  # fmt: skip
        verified = replace(found, layer_forwards=work.layer_forwards, seconds=work.seconds)
        self.store.put("verified", inputs, verified.to_json())
        return verified

    def _inputs(self, n: int, base: Cut, proposals: Proposals) -> dict[str, Any]:
        more = [[sorted(cut), list(names)] for cut, names in proposals.names.items()]
        return {
            "n": n, "base": sorted(base), "more": more, "top": self.top, "after": self.after,
            "max_blocks": self.max_blocks, "fitted": self.texts, "seed": self.subject.seed,
            "proposers": [criterion.name for criterion in PROPOSERS], "patch_texts": PATCH_TEXTS,
            **judge_inputs(self.trials.judge), **self.patch.settings,
        }  # fmt: skip


def _take(proposals: Proposals, plan: Plan, n: int, base: Cut) -> None:
    """Take in a proposal from outside, whatever its blocks."""
    cut = frozenset(plan.dropped)
    if len(cut) != n or not base <= cut:
        held = f" with {ranges(sorted(base))} among them" if base else ""
        raise LayersError(
            f"the proposal {ranges(plan.dropped)} drops {len(cut)} layers: expected {n}{held}"
        )
    names = proposals.names.setdefault(cut, [])
    name = plan.metric or plan.strategy
    if name not in names:
        names.append(name)


def _recalled(known: dict[str, Any]) -> Verified:
    try:
        return Verified.from_json(known)
    except (KeyError, TypeError, ValueError, LayersError, PlanError) as error:
        raise CacheError(
            f"a verified plan of the cache is damaged ({error}): remove it (shallower cache "
            f"--clear), or verify anew (--no-cache)"
        ) from error


def verifier_of(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    *,
    store: Store,
    texts: str,
    tokens: Tokens,
    top: int = 4,
    after: str = "patch",
    max_blocks: int | None = None,
    judge: str = "loss",
    seed: int = 0,
    progress: bool | None = None,
) -> Verifier:
    """Prepare to verify plans of a model that is loaded.

    Args:
        decoder: the model, which is as before afterwards.
        tokenizer: its tokenizer.
        splits: texts that fit and texts that choose; those that report are not looked at.
        store: what was measured before, and where results are kept as they are found.
        texts: identity of the texts that fit and choose, for the store.
        tokens: length of texts, and how many make one forward.
        top: as :class:`Verifier`; so are the others that it has.
        after: as there.
        max_blocks: as there.
        judge: name of the judge: ``loss`` or ``kl``.
        seed: of whatever is drawn.
        progress: as there.

    Returns:
        The verifier, which has run nothing yet.

    Raises:
        LayersError: ``max_blocks`` or ``top`` is less than 1.
        PlanError: ``after`` is unknown.
        ModelError: the layers of the model cannot be run one by one.
        TextsError: fewer than 8 texts to fit, or 4 to choose, have two tokens.
    """
    for name, value in (("max_blocks", max_blocks), ("top", top)):
        if value is not None and value < 1:
            raise LayersError(f"{name} = {value}: expected at least 1")
    if after not in AFTER:
        raise PlanError(f"unknown after {after!r}: expected {' or '.join(AFTER)} (--after)")
    tokens, model, meter = fitting_tokens(decoder, tokens), Layerwise(decoder), Meter()
    fitted = TokenBatches(tokenizer, splits.fit, tokens, min_tokens=2)
    batches = list(fitted)
    judging = judge_of(judge, tokenizer, splits.choose, tokens=tokens)
    _require_enough(sum(map(len, batches)), judging.num_items)
    items = {"items": texts, **judge_inputs(judging)}
    trials = Trials(model, judging, meter=meter, journal=store.journal("trials", items))
    some = evenly(batches, PATCH_TEXTS)
    patch = QuickPatch(model, some, ran=meter.ran)
    settings = {**items, **patch.settings, "fitted": texts, "patch_texts": PATCH_TEXTS}
    patched = PatchedTrials(
        trials, patch, num_texts=sum(map(len, some)), meter=meter,
        journal=store.journal("patched_trials", settings),
    )  # fmt: skip
    subject = Subject(
        decoder, tokenizer, batches, trials, (), texts=(fitted.identity,), seed=seed,
        meter=meter, progress=False,
    )  # fmt: skip
    return Verifier(
        subject, patch, patched, store, texts, top=top, after=after, max_blocks=max_blocks,
        progress=progress,
    )  # fmt: skip


def _require_enough(num_fitting: int, num_choosing: int) -> None:
    """Refuse sets that are too small without their texts of a single token."""
    if num_fitting < FEWEST_FITTING or num_choosing < FEWEST_CHOOSING:
        raise TextsError(
            f"too few texts of at least two tokens: {num_fitting} to fit and {num_choosing} to "
            f"choose, expected {FEWEST_FITTING} and {FEWEST_CHOOSING}; give more, or longer ones "
            f"(--texts, --max-texts, --max-length)"
        )
