"""Verification: proposals of several criteria, raced by a judge, as they are cut or patched."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import LayersError, ModelError, PatchError, PlanError, TextsError
from ..evaluation.loss import fitting_tokens
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..progress import part, track
from ..results.scores import Difference, Scores
from ..results.verification import AFTER, Candidate, Verified
from ..texts.batches import TokenBatches, TokenisedText
from ..texts.splits import FEWEST_CHOOSING, FEWEST_FITTING, Splits
from ..values.entries import ResultStore, recalled
from ..values.layers import blocks_of, check_size, layer_count, ranges
from ..values.plan import VERIFIED, Plan
from ..values.tokens import Tokens
from .judges.judge import Judge, LossJudge, judged_batches
from .patched_trials import PatchedTrials, kept_patched
from .proposals import (
    PROPOSERS,
    Cut,
    Proposals,
    all_costs,
    block_layers,
    contiguous,
    exchanges,
    propose,
    proposing_layers,
)
from .racing import ALPHA, lost
from .subject import Subject, evenly
from .trials import AnyCut, Count, Trials, judge_inputs, kept_trials

PATCH_TEXTS = 24
"""Texts that quick patches are fitted on, evenly over the calibration texts."""

FIRST_ITEMS = 4
"""Items on which the search for neighbours judges, at least."""

STAGES = (FIRST_ITEMS, 16)
"""Items after which a race of patched cuts is thinned out."""

SEARCHED = {"none": 1 / 10, "patch": 1 / 16}
"""Share of the layers of an exhaustive search, beyond which no step of the search begins."""

SEEDS = 3
"""Cuts that the search begins from, the best first."""

MOST = 0.24
"""The share of exhaustive judging that a race takes at most, by estimate; the bound is 1/4."""

_By = Trials | PatchedTrials


class Verifier:
    """Proposals of several criteria for one model that is loaded, and a judge that races them.

    The judge is by default the loss. Test texts of ``splits`` are not looked at. ``texts`` is the
    identity of the others, for the store; ``tokens`` the length of texts, and how many make one
    forward. ``top`` are best blocks of a criterion, and twice as many cuts are in the last race;
    ``after`` is ``none`` (judged as they are cut) or ``patch`` (after a quick one); ``max_blocks``
    are those of a cut.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits[str] | Splits[TokenisedText],
        *,
        judge: Judge | None = None,
        store: ResultStore,
        texts: str,
        tokens: Tokens,
        top: int = 4,
        after: str = "patch",
        max_blocks: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        for name, value in (("max_blocks", max_blocks), ("top", top)):
            if value is not None and value < 1:
                raise LayersError(f"{name} = {value}: expected at least 1")
        _check_after(after)
        self.store, self.texts, self.progress = store, texts, progress
        self.top, self.after, self.max_blocks = top, after, max_blocks
        tokens, model = fitting_tokens(decoder, tokens), Layerwise(decoder)
        fitted = TokenBatches(tokenizer, splits.fit, tokens, min_tokens=2)
        batches = list(fitted)
        judge = judge or LossJudge(judged_batches(tokenizer, splits.choose, tokens))
        _require_enough(sum(map(len, batches)), judge.num_items)
        self.trials = kept_trials(model, judge, store=store, items=texts)
        self.patch = QuickPatch(model, evenly(batches, PATCH_TEXTS))
        self.patched = kept_patched(self.trials, self.patch, store=store, items=texts, fitted=texts)
        identities = (fitted.identity,)
        self.subject = Subject(decoder, batches, self.trials, (), texts=identities, seed=seed)

    def scores(self, cut: AnyCut, *, after: str) -> Scores:
        """Judge a cut on all selection items, as it is cut (``none``) or patched (``patch``)."""
        _check_after(after)
        return self.trials.scores(cut) if after == "none" else self.patched.scores(cut)

    def verify(self, n: int, *, more: Iterable[Plan] = (), after: str | None = None) -> Verified:
        """Find the best cut of ``n`` layers, with ``more`` proposals of the caller's.

        They are judged ``after`` a patch or as they are cut, by default as the verifier says.

        Where proposals are judged after a patch, several may be within one paired standard error of
        the best. Of these the one wins that loses least as it is cut, on the first of the texts: so
        the plan is good both ways.
        """
        check_size(self.subject.num_layers, n)
        proposals = Proposals(max_blocks=self.max_blocks)
        for plan in more:
            _take(proposals, Plan.of(self.subject.num_layers, plan), n)
        after = after or self.after
        inputs = self._inputs(n, proposals, after)
        known = self.store.get("choice", inputs)
        if known is not None:
            return recalled(Verified.from_json, known, "a verified plan")
        started = self.trials.clock()
        with self.trials.counted() as count:
            found = _Verification(self, n, proposals, count=count, after=after).run()
        seconds = self.trials.clock() - started
        verified = replace(found, layer_forwards=count.layer_forwards, seconds=seconds)
        self.store.put("choice", inputs, verified.to_json())
        return verified

    def _inputs(self, n: int, proposals: Proposals, after: str) -> dict[str, Any]:
        return {
            "n": n,
            "more": [[sorted(cut), list(names)] for cut, names in proposals.names.items()],
            "top": self.top,
            "after": after,
            "max_blocks": self.max_blocks,
            "fitted": self.texts,
            "seed": self.subject.seed,
            "proposers": [criterion.name for criterion in PROPOSERS],
            **judge_inputs(self.trials.judge),
            **self.patch.settings,
        }


def _check_after(after: str) -> None:
    if after not in AFTER:
        raise PlanError(f"unknown after {after!r}: expected {' or '.join(AFTER)}")


def _take(proposals: Proposals, plan: Plan, n: int) -> None:
    if len(plan.dropped) != n:
        raise LayersError(
            f"the proposal {ranges(plan.dropped)} drops {layer_count(len(plan.dropped))}: expected "
            f"{n}"
        )
    proposals.take(frozenset(plan.dropped), plan.metric or plan.strategy)


def _require_enough(num_fitting: int, num_choosing: int) -> None:
    """Refuse sets that are too small without their texts of a single token."""
    if num_fitting < FEWEST_FITTING or num_choosing < FEWEST_CHOOSING:
        raise TextsError(
            f"too few texts of at least two tokens: {num_fitting} calibration and {num_choosing} "
            f"selection texts, expected {FEWEST_FITTING} and {FEWEST_CHOOSING}; give more, or "
            f"longer ones (--texts, --max-texts, --max-length)"
        )


class _Verification:
    """One size on its way from proposals to a winner: screened, improved and raced."""

    def __init__(
        self, verifier: Verifier, n: int, proposals: Proposals, *, count: Count, after: str
    ) -> None:
        self.verifier, self.n, self.after = verifier, n, after
        self.subject, self.trials = verifier.subject, verifier.trials
        self.patched, self.top = verifier.patched, verifier.top
        self.proposals = proposals  # of the caller; the others are added
        self.count = count  # layers so far, which bound search and race
        self.named: list[Cut] = []  # cuts of criteria and of the caller
        self._shown = 0

    def run(self) -> Verified:
        """Propose, judge and choose; what it took is in the count."""
        most = round(MOST * self.exhaustive)
        bar = track(f"verify n = {self.n}, layers run", most, self.verifier.progress)
        with bar, part(most) as self._bar:
            self._advance("criteria")
            self._propose()
            self._advance("proposals")
            field = self._screened()
            if self.n > 1:  # of single layers all are there
                self._advance("their neighbours")
                field = self._searched(field)
            self._advance("the last race")
            return self._result(self._raced(field))

    def _advance(self, note: str = "") -> None:
        """Bring the bar to the layers that were run."""
        done = self.count.layer_forwards
        self._bar(done - self._shown, note)
        self._shown = done

    @property
    def exhaustive(self) -> int:
        """Layers that every contiguous block of this size takes, without any that are shared."""
        return block_layers(self.subject.num_layers, self.n) * sum(self._look_sizes)

    @property
    def _first_looks(self) -> int:
        """Looks of at least ``FIRST_ITEMS`` items."""
        return self.trials.looks_at(FIRST_ITEMS)

    @cached_property
    def _look_sizes(self) -> list[int]:
        """The texts that run in every look: one for each item, or several."""
        return [len(batch) for batch in self.trials.judge.batches]

    @property
    def _as_cut(self) -> int:
        """The layers that a cut takes which is judged as it is, once the race is over."""
        items = sum(self._look_sizes[: self.trials.looks_at(STAGES[-1])])
        return (self.subject.num_layers - self.n) * items

    def _propose(self) -> None:
        inputs = {"fitted": self.verifier.texts, "seed": self.subject.seed}
        costs = all_costs(self.subject, self.verifier.store, inputs=inputs)
        self.count.once("proposing", proposing_layers(self.subject))
        propose(self.proposals, costs, self.n, top=self.top)
        self.named = list(self.proposals.names)
        for cut in contiguous(self.subject.num_layers, self.n):
            self.proposals.add(cut, "contiguous")

    def _score(self, cut: Cut, looks: int | None, by: _By) -> Scores | None:
        """Judge a cut; None, and a note why, where it cannot be."""
        if _name(cut) in self.proposals.failed:
            return None
        try:
            found = by.scores(cut, looks)
        except (ModelError, PatchError) as error:
            self.proposals.failed[_name(cut)] = str(error)
            return None
        self._advance()
        return found

    def _scores(self, cuts: Sequence[Cut], looks: int, by: _By) -> list[Scores | None]:
        """Judge cuts by the first looks; None for one that cannot be."""
        by.judge_together([cut for cut in cuts if _name(cut) not in self.proposals.failed], looks)
        return [self._score(cut, looks, by) for cut in cuts]

    def _means(self, cuts: Sequence[Cut], looks: int) -> list[float]:
        found = self._scores(cuts, looks, self.trials)
        return [math.inf if scores is None else scores.mean for scores in found]

    def _best(self, cuts: Iterable[Cut], looks: int, by: _By) -> list[Cut]:
        """Sort cuts by the first looks, the best first; without those that cannot be judged."""
        ordered = sorted(cuts, key=self.trials.path)
        found = zip(ordered, self._scores(ordered, looks, by), strict=True)
        means = {cut: scores.mean for cut, scores in found if scores is not None}
        return sorted(means, key=means.__getitem__)

    def _left(self, field: Sequence[Cut], look: int, most: int, by: _By) -> list[Cut]:
        """The first ``most`` cuts that are not worse than another by more than chance."""
        if look == self.trials.num_looks or len(field) < 2:
            return list(field[:most])
        scores = [by.scores(cut, look) for cut in field]
        share = ALPHA / ((self.trials.num_looks - 1) * (len(field) - 1))
        worse = lost(np.array([one.sums for one in scores]), scores[0].weights, share)
        return [cut for cut, gone in zip(field, worse, strict=True) if not gone][:most]

    def _screened(self) -> list[Cut]:
        """The best proposals by the first few looks."""
        field = list(self.proposals.names)
        for look in range(1, self._first_looks + 1):
            field = self._best(field, look, self.trials)
            field = self._left(field, look, 2 * self.top, self.trials)
        if not field:
            why = "; ".join(self.proposals.failed.values())
            raise ModelError(f"no proposal of {layer_count(self.n)} can be judged: {why}")
        return field

    def _searched(self, field: Sequence[Cut]) -> list[Cut]:
        """The same and their neighbours, by the first few looks, the best first."""
        looks, most = self._first_looks, SEARCHED[self.after] * self.exhaustive
        seen = dict.fromkeys(field)
        for seed in field[:SEEDS]:
            for cut in exchanges(
                lambda cuts: self._means(cuts, looks),
                lambda cuts: self._means(cuts, 1),
                seed,
                num_layers=self.subject.num_layers,
                allows=self.proposals.allows,
                goes_on=lambda: self.count.layer_forwards < most,
            ):
                seen[cut] = None
                self.proposals.add(cut, "exchange")
        return self._best(seen, looks, self.trials)

    def _raced(self, field: Sequence[Cut]) -> dict[Cut, Scores]:
        """Race the best of those that were screened; in few stages if each solves a patch anew."""
        looks: Sequence[int] = range(self._first_looks, self.trials.num_looks + 1)
        by: _By = self.trials
        racing = list(field[: 2 * self.top])
        if self.after == "patch":
            by, racing = self.patched, self._entering(field)
            looks = sorted({self.trials.looks_at(items) for items in STAGES} | {looks[-1]})
        scores: dict[Cut, Scores] = {}
        for number, look in enumerate(looks):
            if number:
                last = looks[number - 1]
                racing = self._left(racing, last, self._affordable(racing, last, look), by)
            racing = self._best(racing, look, by)
            scores |= {cut: by.scores(cut, look) for cut in racing}
        if not scores:
            why = next(reversed(self.proposals.failed.values()))
            raise PatchError(
                f"no proposal of {layer_count(self.n)} can be judged after a patch ({why}): judge "
                f"them as they are cut (after none)"
            )
        return scores

    def _affordable(self, racing: Sequence[Cut], last: int, look: int) -> int:
        """How many cuts, two at least, can be judged between two looks within the bound of work."""
        sizes, as_cut = self._look_sizes, self._as_cut
        layers = np.array([self._changed(cut) for cut in racing], int)
        rest = MOST * self.exhaustive - self.count.layer_forwards
        if look == len(sizes):  # those that cannot be told apart are judged as cuts, too
            return max(2, int(sum(np.cumsum(layers * sum(sizes[last:]) + as_cut) <= rest)))
        rest -= 2 * (sum(layers) / max(1, len(layers)) * sum(sizes[look:]) + as_cut)
        return max(2, int(sum(np.cumsum(layers) * sum(sizes[last:look]) <= rest)))

    def _changed(self, cut: Cut) -> int:
        """How many layers run anew where a cut is judged after a patch."""
        return sum(layer >= min(cut) - 1 for layer in self.trials.path(cut))

    def _entering(self, field: Sequence[Cut]) -> list[Cut]:
        """The cuts that are patched: the best of the field and of first proposals, then others.

        Those that drop layer 0, which has none before it, take no place.
        """
        firsts: dict[str, Cut] = {}
        for cut in self.named:
            for name in self.proposals.names[cut]:
                firsts.setdefault(name, cut)
        best = self._best(dict.fromkeys(firsts.values()), 1, self.trials)
        order = list(dict.fromkeys([*field[: self.top], *best, *field]))
        places = np.cumsum([0 not in cut for cut in order])
        least, most = (int(np.searchsorted(places, top)) + 1 for top in (self.top, 2 * self.top))
        return order[: max(least, self._patchable(order[:most]))]

    def _patchable(self, order: Sequence[Cut]) -> int:
        """How many cuts can be patched and first judged within the bound; two reach the end."""
        sizes, texts = self._look_sizes, self.patched.patch.num_texts
        first = self.trials.looks_at(STAGES[0])
        layers = np.array([self._changed(cut) for cut in order])
        inside = np.array(
            [sum(min(cut) <= one + 1 <= max(cut) for one in self.trials.path(cut)) for cut in order]
        )
        self.trials.count_prepared(self.trials.first(None))  # as the first patch needs it
        rest = MOST * self.exhaustive - self.count.layer_forwards - self.subject.num_layers * texts
        rest -= 2 * (layers.mean() * sum(sizes[first:]) + self._as_cut)
        patched = np.array([0 not in cut for cut in order])
        each = patched * (inside * texts + layers * sum(sizes[:first]))
        return int(sum(np.cumsum(each) <= rest))

    def _result(self, scores: dict[Cut, Scores]) -> Verified:
        """The winner and the others; of a tie after a patch, the best as bare cuts wins."""
        complete = [cut for cut, found in scores.items() if found.complete]
        winner = min(complete, key=lambda cut: scores[cut].mean)
        if self.after == "patch":
            near = [cut for cut in complete if _is_near(scores[cut].minus(scores[winner]))]
            looks = self.trials.looks_at(STAGES[-1])
            means = dict(zip(near, self._means(near, looks), strict=True))
            winner = min(near, key=means.__getitem__)
        order = sorted(scores, key=lambda cut: cut != winner)
        judge = self.trials.judge
        return Verified(
            self.n,
            self.after,
            judge.name,
            judge.unit,
            tuple(self._candidate(cut, scores, winner) for cut in order),
            judge.num_items,
            num_proposals=len(self.proposals.names),
            layer_forwards=0,
            seconds=0.0,
            failed=dict(self.proposals.failed),
        )

    def _candidate(self, cut: Cut, scores: dict[Cut, Scores], winner: Cut) -> Candidate:
        found = scores[cut]
        blocks, identity = blocks_of(sorted(cut)), self.subject.decoder.identity
        plan = Plan(self.subject.num_layers, blocks, "search", VERIFIED, model=identity)
        difference = found.minus(scores[winner])
        if cut == winner:
            difference = Difference(0.0, 0.0, len(found))
        names = tuple(self.proposals.names[cut])
        return Candidate(plan, names, found.mean, found.stderr, difference, not found.complete)


def _is_near(difference: Difference) -> bool:
    """Whether a cut is within one paired standard error of the best."""
    return not difference.stderr < difference.mean


def _name(cut: Cut) -> str:
    return f"layers {ranges(sorted(cut))}"
