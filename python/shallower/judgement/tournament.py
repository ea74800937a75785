"""Tournament: proposals of one size, screened, improved and raced until one has won."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import ModelError, PatchError
from ..progress import Advance
from ..values.layers import blocks_of, ranges
from ..values.plan import Plan
from ..values.scores import Difference, Scores
from ..values.verification import Candidate, Verified
from .neighbours import exchanges
from .patched_trials import PatchedTrials
from .proposals import Cut, Proposals, all_costs, propose, windows
from .racing import ALPHA, lost
from .referee import Store
from .subject import Subject
from .trials import Trials
from .work import Work

FIRST_ITEMS = 4
"""Items on which the search for neighbours judges, at least."""

SEARCHED = 1 / 10
"""Share of the layers of an exhaustive search, beyond which no step of the search begins."""

MOST = 1 / 4
"""Share of them that a race takes at most, where two cuts do not take more."""

SEEDS = 3
"""Cuts that the search begins from, the best first."""


@dataclass
class Tournament:
    """One size on its way from proposals to a winner.

    Attributes:
        subject: the model, the texts that fit and those that choose.
        patched: cuts judged after a quick patch.
        store: what was measured before.
        texts: identity of the texts, for the store.
        n: layers that go.
        base: those of them that are gone already.
        top: as of :class:`shallower.judgement.verifying.Verifier`; so is ``after``.
        after: as there.
        proposals: those from outside; the others are added to them.
        work: the open account, which bounds the search.
        advance: of a bar; by a cut that was judged.
    """

    subject: Subject
    patched: PatchedTrials
    store: Store
    texts: str
    n: int
    base: Cut
    top: int
    after: str
    proposals: Proposals
    work: Work
    advance: Advance
    named: list[Cut] = field(default_factory=list)

    @property
    def trials(self) -> Trials:
        """Cuts judged as they are, on the texts that choose."""
        return self.subject.trials

    def run(self) -> Verified:
        """Propose, judge and choose.

        Returns:
            The result; what it took is in the account.

        Raises:
            ModelError: no proposal can be judged.
            PatchError: none can be patched.
        """
        self._propose()
        field = self._searched(self._screened())
        scores = self._raced(field) if self.after == "none" else self._patched(field)
        return self._result(scores)

    @property
    def exhaustive(self) -> int:
        """Layers that every contiguous block of this size takes, without any that are shared."""
        left = self.subject.num_layers - self.n
        return (left + 1) * left * self.trials.judge.num_items

    @property
    def _first_looks(self) -> int:
        """Looks of at least ``FIRST_ITEMS`` items."""
        ends = np.cumsum([len(items) for items in self.trials.judge.items])
        return min(int(np.searchsorted(ends, FIRST_ITEMS)) + 1, len(ends))

    def _propose(self) -> None:
        n = self.n
        inputs = {"fitted": self.texts, "seed": self.subject.seed}
        costs = all_costs(self.subject, self.store, inputs=inputs)
        propose(self.proposals, costs, n, base=self.base, top=self.top)
        self.named = list(self.proposals.names)
        for cut in windows(self.subject.num_layers, n, base=self.base):
            self.proposals.add(cut, "contiguous")

    def _score(self, cut: Cut, looks: int | None = None) -> Scores | None:
        """Judge a cut as it is; None, and a note why, where it cannot be."""
        if _name(cut) in self.proposals.failed:
            return None
        try:
            found = self.trials.scores(cut, looks)
        except ModelError as error:
            self.proposals.failed[_name(cut)] = str(error)
            return None
        self.advance(1)
        return found

    def _mean(self, cut: Cut, looks: int) -> float:
        scores = self._score(cut, looks)
        return math.inf if scores is None else scores.mean

    def _best(self, cuts: Iterable[Cut], looks: int) -> list[Cut]:
        """Sort cuts by the first looks, the best first; without those that cannot be judged."""
        ordered = sorted(cuts, key=self.trials.path)
        means = {cut: self._mean(cut, looks) for cut in ordered}
        return sorted((c for c in ordered if math.isfinite(means[c])), key=means.__getitem__)

    def _screened(self) -> list[Cut]:
        """The best proposals by the first few looks."""
        field = list(self.proposals.names)
        for look in range(1, self._first_looks + 1):
            field = self._left(self._best(field, look), look, 2 * self.top)
        if not field:
            why = "; ".join(self.proposals.failed.values())
            raise ModelError(f"no proposal of {self.n} layers can be judged: {why}")
        return field

    def _left(self, field: Sequence[Cut], look: int, most: int) -> list[Cut]:
        """Those of some cuts, the best first, that are not worse than another by more than chance
        after a look, as many as ``most``.
        """
        trials = self.trials
        if look == trials.num_looks or len(field) < 2:
            return list(field[:most])
        scores = [trials.scores(cut, look) for cut in field]
        share = ALPHA / ((trials.num_looks - 1) * (len(field) - 1))
        worse = lost(np.array([one.sums for one in scores]), scores[0].weights, share)
        return [cut for cut, gone in zip(field, worse, strict=True) if not gone][:most]

    def _searched(self, field: Sequence[Cut]) -> list[Cut]:
        """The same and their neighbours, by the first few looks, the best first."""
        looks, most = self._first_looks, SEARCHED * self.exhaustive
        seen = dict.fromkeys(field)
        for seed in field[:SEEDS]:
            for cut in exchanges(
                lambda cut: self._mean(cut, looks), lambda cut: self._mean(cut, 1), seed,
                num_layers=self.subject.num_layers, base=self.base,
                allows=self.proposals.allows, goes_on=lambda: self.work.layer_forwards < most,
            ):  # fmt: skip
                seen[cut] = None
                self.proposals.add(cut, "exchange")
        return self._best(seen, looks)

    def _raced(self, field: Sequence[Cut]) -> dict[Cut, Scores]:
        """Race the best as they are cut."""
        trials, left = self.trials, list(field[: 2 * self.top])
        scores = {cut: self._score(cut, self._first_looks) for cut in left}
        for look in range(self._first_looks + 1, trials.num_looks + 1):
            left = self._best(self._left(left, look - 1, self._affordable(look)), look)
            scores |= {cut: self._score(cut, look) for cut in left}
            if len(left) == 1:
                scores[left[0]] = self._score(left[0])
        return {cut: found for cut, found in scores.items() if found is not None}

    def _affordable(self, look: int) -> int:
        """How many cuts can be judged from a look on within the bound of work, two at least."""
        items = sum(map(len, self.trials.judge.items[look - 1 :]))
        rest = MOST * self.exhaustive - self.work.layer_forwards
        return max(2, int(rest // ((self.subject.num_layers - self.n) * items)))

    def _patched(self, field: Sequence[Cut]) -> dict[Cut, Scores]:
        """Judge after a quick patch the best as they are cut, and the best of every criterion."""
        top = self.top
        chosen = dict.fromkeys(field[: 2 * top])
        chosen |= dict.fromkeys(self._firsts())
        scores: dict[Cut, Scores] = {}
        weights, looks = self.trials.judge.weights, self.trials.num_looks
        share = ALPHA / (max(1, looks - 1) * max(1, len(chosen) - 1))

        def enough(found: Scores) -> bool:
            others = [one for one in scores.values() if len(one) >= len(found)]
            if self._affordable(1) <= 2:  # what is left is for what is the best so far
                return any(found.minus(other).mean > 0 for other in others)
            sums = np.array([one.sums for one in (*others, found)])
            return len(sums) > 1 and bool(lost(sums, weights, share)[-1])

        for cut in chosen:
            if len(scores) >= top and self._affordable(1) <= 2:
                break
            try:
                scores[cut] = self.patched.scores(cut, enough)
            except (ModelError, PatchError) as error:
                self.proposals.failed[_name(cut)] = str(error)
            self.advance(1)
        if not scores:
            why = next(reversed(self.proposals.failed.values()))
            raise PatchError(
                f"no proposal of {self.n} layers can be judged after a patch ({why}): judge them "
                f"as they are cut (after none, --after none)"
            )
        return scores

    def _firsts(self) -> list[Cut]:
        """The first proposal of every criterion, and of whoever else named some."""
        firsts: dict[str, Cut] = {}
        for cut in self.named:
            for name in self.proposals.names[cut]:
                firsts.setdefault(name, cut)
        return [cut for cut in firsts.values() if _name(cut) not in self.proposals.failed]

    def _result(self, scores: dict[Cut, Scores]) -> Verified:
        complete = [cut for cut, found in scores.items() if found.complete]
        winner = min(complete, key=lambda cut: scores[cut].mean)
        if self.after == "patch":
            near = [cut for cut in complete if _is_near(scores[cut].minus(scores[winner]))]
            winner = min(near, key=lambda cut: self._mean(cut, self.trials.num_looks))
        order = sorted(
            scores, key=lambda cut: (cut != winner, not scores[cut].complete, scores[cut].mean)
        )
        candidates = tuple(self._candidate(cut, scores, winner) for cut in order)
        judge = self.trials.judge
        return Verified(
            self.n, self.after, judge.name, judge.unit, candidates, judge.num_items,
            num_proposals=len(self.proposals.names), layer_forwards=0, seconds=0.0,
            failed=dict(self.proposals.failed),
        )  # fmt: skip

    def _candidate(self, cut: Cut, scores: dict[Cut, Scores], winner: Cut) -> Candidate:
        found = scores[cut]
        blocks = blocks_of(sorted(cut))
        if len(blocks) == 1:
            blocks = (replace(blocks[0], score=found.mean, stderr=found.stderr),)
        plan = Plan(
            self.subject.num_layers, blocks, "search", "verified",
            model=self.subject.decoder.identity,
        )  # fmt: skip
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
