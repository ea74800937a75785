"""Tournament: proposals of one size, screened, improved and raced until one has won."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ModelError, PatchError
from ..progress import Advance
from ..values.layers import blocks_of, ranges
from ..values.plan import VERIFIED, Plan
from ..values.scores import Difference, Scores
from ..values.verification import Candidate, Verified
from .held_out_cuts import Store
from .neighbours import exchanges
from .patched_trials import PatchedTrials
from .proposals import Cut, Proposals, all_costs, propose, windows
from .racing import ALPHA, lost
from .subject import Subject
from .trials import Trials
from .work import Work

FIRST_ITEMS = 4
"""Items on which the search for neighbours judges, at least."""

STAGES = (FIRST_ITEMS, 16)
"""Items after which a race of patched cuts is thinned out."""

SEARCHED = {"none": 1 / 10, "patch": 1 / 16}
"""Share of the layers of an exhaustive search, beyond which no step of the search begins."""

MOST = 0.24
"""Share of them that a race takes at most, where two cuts do not take more; what it takes is
estimated, and a quarter is the bound."""

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
        field = self._screened()
        if self.n - len(self.base) > 1:  # of single layers all are there
            field = self._searched(field)
        return self._result(self._raced(field))

    @property
    def exhaustive(self) -> int:
        """Layers that every contiguous block of this size takes, without any that are shared."""
        left = self.subject.num_layers - self.n
        return (left + 1) * left * self.trials.judge.num_items

    @property
    def _first_looks(self) -> int:
        """Looks of at least ``FIRST_ITEMS`` items."""
        return self._looks_of(FIRST_ITEMS)

    @property
    def _look_sizes(self) -> list[int]:
        """The items of every look."""
        return [len(items) for items in self.trials.judge.items]

    @property
    def _as_cut(self) -> int:
        """The layers that a cut takes which is judged as it is, once the race is over."""
        items = sum(self._look_sizes[: self._looks_of(STAGES[-1])])
        return (self.subject.num_layers - self.n) * items

    def _looks_of(self, num_items: int) -> int:
        """The fewest looks that have so many items, or all looks."""
        ends = np.cumsum(self._look_sizes)
        return min(int(np.searchsorted(ends, num_items)) + 1, len(ends))

    def _propose(self) -> None:
        n = self.n
        inputs = {"fitted": self.texts, "seed": self.subject.seed}
        costs = all_costs(self.subject, self.store, inputs=inputs)
        propose(self.proposals, costs, n, base=self.base, top=self.top)
        self.named = list(self.proposals.names)
        for cut in windows(self.subject.num_layers, n, base=self.base):
            self.proposals.add(cut, "contiguous")

    def _score(self, cut: Cut, looks: int | None, by: Trials | PatchedTrials) -> Scores | None:
        """Judge a cut; None, and a note why, where it cannot be."""
        if _name(cut) in self.proposals.failed:
            return None
        try:
            found = by.scores(cut, looks)
        except (ModelError, PatchError) as error:
            self.proposals.failed[_name(cut)] = str(error)
            return None
        self.advance(1)
        return found

    def _mean(self, cut: Cut, looks: int | None) -> float:
        scores = self._score(cut, looks, self.trials)
        return math.inf if scores is None else scores.mean

    def _best(self, cuts: Iterable[Cut], looks: int, by: Trials | PatchedTrials) -> list[Cut]:
        """Sort cuts by the first looks, the best first; without those that cannot be judged."""
        ordered = sorted(cuts, key=self.trials.path)
        found = {cut: self._score(cut, looks, by) for cut in ordered}
        means = {cut: scores.mean for cut, scores in found.items() if scores is not None}
        return sorted(means, key=means.__getitem__)

    def _left(
        self, field: Sequence[Cut], look: int, most: int, by: Trials | PatchedTrials
    ) -> list[Cut]:
        """Those of some cuts, the best first, that are not worse than another by more than chance
        after a look, as many as ``most``.
        """
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
            raise ModelError(f"no proposal of {self.n} layers can be judged: {why}")
        return field

    def _searched(self, field: Sequence[Cut]) -> list[Cut]:
        """The same and their neighbours, by the first few looks, the best first."""
        looks, most = self._first_looks, SEARCHED[self.after] * self.exhaustive
        seen = dict.fromkeys(field)
        for seed in field[:SEEDS]:
            for cut in exchanges(
                lambda cut: self._mean(cut, looks), lambda cut: self._mean(cut, 1), seed,
                num_layers=self.subject.num_layers, base=self.base,
                allows=self.proposals.allows, goes_on=lambda: self.work.layer_forwards < most,
            ):  # fmt: skip
                seen[cut] = None
                self.proposals.add(cut, "exchange")
        return self._best(seen, looks, self.trials)

    def _raced(self, field: Sequence[Cut]) -> dict[Cut, Scores]:
        """Race the best of those that were screened, as cuts or after a patch.

        After a patch there are few stages, for each solves those that are left anew.
        """
        looks: Sequence[int] = range(self._first_looks, self.trials.num_looks + 1)
        by: Trials | PatchedTrials = self.trials
        racing = list(field[: 2 * self.top])
        if self.after == "patch":
            by, racing = self.patched, self._entering(field)
            looks = sorted({self._looks_of(items) for items in STAGES} | {looks[-1]})
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
                f"no proposal of {self.n} layers can be judged after a patch ({why}): judge them "
                f"as they are cut (after none, --after none)"
            )
        return scores

    def _affordable(self, racing: Sequence[Cut], last: int, look: int) -> int:
        """How many of some cuts can be judged from one look to another within the bound of work,
        so that two of them can go on to the end; two at least.
        """
        sizes, as_cut = self._look_sizes, self._as_cut
        layers = np.array([self._changed(cut) for cut in racing], int)
        rest = MOST * self.exhaustive - self.work.layer_forwards
        if look == len(sizes):  # those that cannot be told apart are judged as cuts, too
            return max(2, int(sum(np.cumsum(layers * sum(sizes[last:]) + as_cut) <= rest)))
        rest -= 2 * (sum(layers) / max(1, len(layers)) * sum(sizes[look:]) + as_cut)
        return max(2, int(sum(np.cumsum(layers) * sum(sizes[last:look]) <= rest)))

    def _changed(self, cut: Cut) -> int:
        """How many layers run anew where a cut is judged after a patch."""
        return sum(layer >= min(cut) - 1 for layer in self.trials.path(cut))

    def _entering(self, field: Sequence[Cut]) -> list[Cut]:
        """The cuts that are patched: the best of the field and of the criteria's first proposals,
        then more of the field. Those that drop layer 0, which has none before it, take no place.
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
        """How many of some cuts can be patched and judged for the first time within the bound of
        work, so that two of them can go on to the end.
        """
        sizes, texts = self._look_sizes, self.patched.num_texts
        first = self._looks_of(STAGES[0])
        layers = np.array([self._changed(cut) for cut in order])
        inside = np.array(
            [sum(min(cut) <= one + 1 <= max(cut) for one in self.trials.path(cut)) for cut in order]
        )
        rest = MOST * self.exhaustive - self.work.layer_forwards - self.subject.num_layers * texts
        rest -= 2 * (layers.mean() * sum(sizes[first:]) + self._as_cut)
        patched = np.array([0 not in cut for cut in order])
        each = patched * (inside * texts + layers * sum(sizes[:first]))
        return int(sum(np.cumsum(each) <= rest))

    def _result(self, scores: dict[Cut, Scores]) -> Verified:
        """The winner and the others; of cuts that a quick patch cannot tell apart, the one wins
        that loses least as it is cut, on the first of the items.
        """
        complete = [cut for cut, found in scores.items() if found.complete]
        winner = min(complete, key=lambda cut: scores[cut].mean)
        if self.after == "patch":
            near = [cut for cut in complete if _is_near(scores[cut].minus(scores[winner]))]
            looks = self._looks_of(STAGES[-1])
            winner = min(near, key=lambda cut: self._mean(cut, looks))
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
        plan = Plan(
            self.subject.num_layers, blocks_of(sorted(cut)), "search", VERIFIED,
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
