"""Plans that are verified, against judgements of every cut."""

import itertools
import json

import numpy as np
import pytest

import shallower as sh
from shallower.errors import LayersError, PatchError, PlanError
from shallower.judgement import proposals
from shallower.judgement.verifying import Verifier
from shallower.models.decoder import Decoder
from shallower.patching.quick import QuickPatch
from shallower.results.verification import Verified
from shallower.texts.splits import Splits
from shallower.values.layers import blocks_of
from shallower.values.plan import Plan
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import documents
from tests.judgement import toy
from tests.judgement.test_trials import Counted

TEXTS = documents(40, seed=5)
SPLITS = Splits(TEXTS[:16], TEXTS[16:], [], 0)


class Killed(BaseException):
    """A death at any moment."""


class Journal(list):
    """Records as JSON; appending kills once the store's time is over."""

    def __init__(self, store):
        super().__init__()
        self.store = store

    def read(self):
        return [json.loads(record) for record in self]

    def append(self, record):
        super().append(json.dumps(record))
        self.store.live()


class MemoryStore:
    """A store that outlives the process in mind, which is killed after so many writes."""

    def __init__(self):
        self.results, self.journals, self.left = {}, {}, 10**9

    def live(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def get(self, kind, inputs):
        found = self.results.get((kind, json.dumps(inputs, sort_keys=True)))
        return None if found is None else json.loads(found)

    def put(self, kind, inputs, value):
        self.results[kind, json.dumps(inputs, sort_keys=True)] = json.dumps(value)
        self.live()

    def journal(self, kind, inputs):
        return self.journals.setdefault((kind, json.dumps(inputs, sort_keys=True)), Journal(self))

    @property
    def writes(self):
        return len(self.results) + sum(map(len, self.journals.values()))


def make(model, words, *, store=None, splits=SPLITS, **options):
    return Verifier(
        Decoder.of(model), words, splits, store=store or MemoryStore(), texts="texts",
        tokens=Tokens(64, 8), progress=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(8, seed=2)


def outcome(verified):
    """All that a result is, but for its wall time."""
    return verified.to_json() | {"seconds": 0}


@pytest.mark.parametrize(
    ("n", "max_blocks"),
    mostly_slow(itertools.product([1, 2, 3, 6], [None, 1, 2]), [(2, 1), (3, 2), (6, None)]),
)
def test_the_winner_is_the_best_of_those_that_came_into_the_race(llama, words, n, max_blocks):
    verifier = make(llama, words, after="none", max_blocks=max_blocks)
    found = verifier.verify(n)
    means = {c.plan.dropped: verifier.scores(c.plan.dropped, after="none").mean
             for c in found.candidates if not c.lost_early}  # fmt: skip
    assert found.plan.dropped == min(means, key=means.get)
    assert found.candidates[0].score == means[found.plan.dropped]
    assert found.candidates[0].difference.mean == 0
    for candidate in found.candidates:
        assert len(candidate.plan.dropped) == n
        assert candidate.proposed_by
        assert max_blocks is None or len(blocks_of(candidate.plan.dropped)) <= max_blocks
    assert found.failed == {}
    assert Verified.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("after", ["none", "patch"])
def test_layers_that_do_nothing_are_found_wherever_they_are(words, after):
    kinds = ("plain", "plain", "identity", "plain", "plain", "identity", "plain", "identity")
    model = toy.toy_model(kinds)
    drawn = toy.toy_texts(model, count=48)
    verifier = make(model, words, splits=Splits(drawn[:24], drawn[24:], [], 0), after=after)
    found = verifier.verify(3)
    assert found.plan.dropped == (2, 5, 7)
    whole = verifier.scores((), after="none").mean
    assert verifier.scores(found.plan.dropped, after="none").mean == pytest.approx(whole, abs=1e-6)


def test_after_a_patch_the_best_is_good_both_ways_and_weights_are_as_before(llama, words):
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    verifier = make(llama, words, after="patch")
    found = verifier.verify(3)
    assert all(np.array_equal(before[name], weight) for name, weight in llama.state_dict().items())
    scores = {c.plan.dropped: verifier.scores(c.plan.dropped, after="patch")
              for c in found.candidates if not c.lost_early}  # fmt: skip
    best = min(scores.values(), key=lambda one: one.mean)
    near = [
        cut for cut, one in scores.items() if (d := one.minus(best)).mean <= d.stderr or one is best
    ]
    as_cut = {cut: verifier.scores(cut, after="none").mean for cut in near}
    assert found.plan.dropped == min(as_cut, key=as_cut.get)
    assert found.candidates[0].score == scores[found.plan.dropped].mean
    behind = [one.difference.mean for one in found.candidates[1:]]
    assert behind == sorted(behind)
    assert found.margin.mean == behind[0]


def test_scores_after_a_patch_are_those_of_the_model_that_is_patched(llama, words):
    verifier = make(llama, words, after="patch")
    dropped = (2, 3, 5)
    plan = Plan.of(8, dropped)
    with verifier.patch.patched(plan), sh.without_layers(llama, plan):
        loss = sh.evaluate_loss(llama, words, SPLITS.choose, max_length=64)
    scores = verifier.scores(dropped, after="patch")
    assert scores.mean == pytest.approx(loss.nats, abs=1e-5)
    assert scores.stderr == pytest.approx(loss.stderr, abs=1e-5)


def test_proposals_of_others_take_part(llama, words):
    verifier = make(llama, words, after="none", max_blocks=1)
    odd = Plan(8, blocks_of((1, 3, 5)), "costs", "mine")
    found = verifier.verify(3, more=[odd])
    assert found.num_proposals == verifier.verify(3).num_proposals + 1
    best = verifier.verify(3).plan
    named = verifier.verify(3, more=[Plan(8, best.blocks, "costs", "mine")])
    assert "mine" in named.candidates[0].proposed_by


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"n": 0}, "expected 1 <= n <= 7"),
        ({"n": 8}, "expected 1 <= n <= 7"),
        ({"n": 2, "more": [Plan.of(8, [1, 2, 3])]}, "drops 3 layers: expected 2"),
    ],
)
def test_what_cannot_be_is_refused(llama, words, asked, said):
    with pytest.raises(LayersError, match=said):
        make(llama, words, after="none").verify(**asked)


def test_options_that_cannot_be_are_refused(llama, words):
    for options in ({"top": 0}, {"max_blocks": 0}):
        with pytest.raises(LayersError, match="expected at least 1"):
            make(llama, words, **options)
    with pytest.raises(PlanError, match="expected none or patch"):
        make(llama, words, after="healing")


def test_a_criterion_that_fails_is_named_and_the_others_go_on(llama, words, monkeypatch):
    class Broken(sh.Criterion):
        name = "broken"

        def costs(self, subject):
            raise ZeroDivisionError("it\nfails")

    monkeypatch.setattr(proposals, "PROPOSERS", (Broken(), *proposals.PROPOSERS))
    found = make(llama, words, after="none").verify(2)
    assert found.failed == {"broken": "ZeroDivisionError: it fails"}


def test_a_cut_that_cannot_be_patched_is_named(llama, words):
    found = make(llama, words, after="patch").verify(2, more=[Plan.of(8, [0, 1])])
    assert "no layer before the block" in found.failed["layers [0, 2)"]
    assert all(0 not in c.plan.dropped for c in found.candidates)


def test_a_model_that_cannot_be_patched_says_so(llama, words, monkeypatch):
    def refused(_self, _plan):
        raise PatchError("it has no writers")

    monkeypatch.setattr(QuickPatch, "patched", refused)
    with pytest.raises(PatchError, match=r"it has no writers.*after none"):
        make(llama, words, after="patch").verify(2)


@pytest.mark.parametrize(
    ("after", "steps"),
    mostly_slow([("none", (1,)), ("patch", (4, 11)), ("patch", (1,))], quick=[("none", (1,))]),
)
def test_killed_at_any_write_it_ends_the_same_and_repeats_nothing(llama, words, after, steps):
    whole = MemoryStore()
    expected = make(llama, words, store=whole, after=after, top=2).verify(3)
    total = whole.writes
    for step in steps:
        store, deaths = MemoryStore(), 0
        while True:
            store.left = step
            try:
                done = make(llama, words, store=store, after=after, top=2).verify(3)
                break
            except Killed:
                deaths += 1
        assert deaths >= total // (step + 1) > 0
        assert store.writes == total
        assert outcome(done) == outcome(expected)


def test_what_was_verified_is_recalled(llama, words, monkeypatch):
    store = MemoryStore()
    first = make(llama, words, store=store, after="none").verify(2)
    writes = store.writes
    assert make(llama, words, store=store, after="none").verify(2) == first
    assert store.writes == writes


@pytest.mark.slow
@pytest.mark.parametrize("after", ["none", "patch"])
def test_work_is_bounded_by_the_exhaustive_search(words, after):
    splits = Splits(TEXTS[:8], documents(60, seed=8), [], 0)
    verifier = make(tiny_llama(16, seed=1), words, splits=splits, after=after)
    for n in (1, 4):
        limit = (16 - n + 1) * (16 - n) * len(splits.choose) / 4
        assert 0 < verifier.verify(n).layer_forwards <= limit


@pytest.mark.parametrize(
    "dropped",
    [(2, 3, 5), *(pytest.param(one, marks=pytest.mark.slow) for one in ((3,), (1, 2, 4, 5, 7)))],
)
def test_the_layers_of_a_patch_are_counted_as_they_run(words, dropped):
    model = tiny_llama(8, seed=2)
    verifier, counted = make(model, words), Counted(model)
    with verifier.trials.counted() as count:
        verifier.scores(dropped, after="patch")
    before, first = counted.runs, count.layer_forwards
    with verifier.trials.counted() as again:
        verifier.scores(dropped, after="patch")
    assert again.layer_forwards == first
    assert counted.runs == before
    # The probes that find what a layer writes by are of one text, and not counted.
    assert first <= before <= first + 40 * len(blocks_of(dropped))


@pytest.mark.slow
def test_chance_among_four_items_ends_no_race_of_patched_cuts(words):
    splits = Splits(TEXTS[:8], documents(60, seed=8), [], 0)
    verifier = make(tiny_llama(16, seed=1), words, splits=splits, after="patch")
    candidates = verifier.verify(1).candidates
    assert len(candidates) > 3
    assert all(one.difference.num_items >= 16 for one in candidates)


def test_cuts_that_cannot_be_patched_take_no_place_in_the_race(words):
    model = toy.toy_model(("identity",) + ("plain",) * 7)
    drawn = toy.toy_texts(model, count=48)
    splits = Splits(drawn[:24], drawn[24:], [], 0)
    found = make(model, words, splits=splits, after="patch", top=1).verify(2)
    assert 0 not in found.plan.dropped
    assert any("[0, 1)" in cut for cut in found.failed)
