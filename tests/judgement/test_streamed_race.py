"""The race of cuts of a model whose layers are streamed: the same plan, each layer read for all."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from shallower.errors import CriterionError, ModelError, PatchError
from shallower.evaluation.loss import evaluate_loss
from shallower.judgement.criteria import BUILT_IN
from shallower.judgement.judges import judge_of
from shallower.judgement.racing import race
from shallower.judgement.trials import Trials
from shallower.judgement.verifying import Verifier
from shallower.memory import budget
from shallower.models.architecture import find_layers
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.models.offload import changed_weights, reading_of
from shallower.models.stored_layers import LayerWeights
from shallower.texts.splits import Splits
from shallower.values.plan import Plan
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, word_tokenizer
from tests.documents import documents
from tests.families import random_model
from tests.judgement.test_verifying import Killed, MemoryStore
from tests.memory.test_streaming import FAMILIES, both, folder, stored  # noqa: F401

TEXTS = documents(24, seed=5)
SPLITS = Splits(TEXTS[:12], TEXTS[12:], [], 0)


def prepared(model, tokenizer, after="patch", store=None):
    store = store or MemoryStore()
    return Verifier(
        Decoder.of(model), tokenizer, SPLITS, store=store, texts="some", top=2,
        tokens=Tokens(12, 4), after=after, progress=False,
    )  # fmt: skip


def verified(model, tokenizer, n, *, after="patch", store=None):
    verifier = prepared(model, tokenizer, after, store)
    found = verifier.verify(n)
    return replace(found, seconds=0.0).to_json(), verifier


@pytest.fixture(scope="module")
def raced(folder):  # noqa: F811
    """The race of two layers of the model in memory, after a patch, and its verifier."""
    return verified(both(folder)[1], word_tokenizer(), 2)


@pytest.fixture(scope="module")
def streamed(folder):  # noqa: F811
    """The same of the model that is streamed, and the bytes that it read."""
    model, _, tokenizer = both(folder)
    before = reading_of(model).bytes_read
    found = verified(model, tokenizer, 2)
    return *found, reading_of(model).bytes_read - before


@pytest.fixture
def reads(monkeypatch):
    """How often each matrix was read from disk."""
    counts, loaded = Counter(), LayerWeights.__getitem__

    def counting(self, key):
        counts[key] += 1
        return loaded(self, key)

    monkeypatch.setattr(LayerWeights, "__getitem__", counting)
    return counts


def test_a_streamed_race_chooses_the_same_plan(raced, streamed):
    assert_the_same(streamed[:2], raced, "patch")


@pytest.mark.slow
@pytest.mark.parametrize(("after", "n"), [("none", 1), ("none", 2), ("patch", 1)])
def test_other_streamed_races_choose_the_same_plan(folder, after, n):  # noqa: F811
    *models, tokenizer = both(folder)
    assert_the_same(*(verified(one, tokenizer, n, after=after) for one in models), after)


def assert_the_same(one, other, after):
    (first, one), (second, other) = one, other
    assert first == second
    for cut in ([1], [2, 3], [1, 4]):
        scores = [some.scores(cut, after=after) for some in (one, other)]
        np.testing.assert_array_equal(*(one.sums for one in scores))


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["gemma3_text"]))
def test_every_kind_of_layer_is_raced_to_the_same_plan(family, tmp_path, words):
    streamed, whole, tokenizer = both(stored(tmp_path / family, random_model(family), words))
    results = []
    for model in (streamed, whole):
        store = MemoryStore()
        try:
            results.append(verified(model, tokenizer, 2, store=store)[0])
        except PatchError as error:
            found, _ = verified(model, tokenizer, 2, after="none", store=store)
            results.append((str(error), found))
    assert results[0] == results[1]


def test_states_that_find_no_room_are_more_reads_for_the_same_plan(
    folder,  # noqa: F811
    raced,
    streamed,
    monkeypatch,
):
    model, _, tokenizer = both(folder)
    monkeypatch.setattr(budget.BUDGET, "bound", 60_000)
    before = reading_of(model).bytes_read
    assert verified(model, tokenizer, 2)[0] == raced[0]
    assert reading_of(model).bytes_read - before > 2 * streamed[2]


def test_a_layer_is_read_once_for_all_cuts_of_a_look(folder, reads):  # noqa: F811
    streamed, whole, tokenizer = both(folder)
    tokens, cuts = Tokens(12, 4), [(), (1,), (1, 2), (0, 5), (3,)]
    winners, sums = [], []
    for model in (whole, streamed):
        assert not reads  # of the model in memory
        judge = judge_of("loss", tokenizer, TEXTS, tokens=tokens)
        trials = Trials(Layerwise(model), judge, memory=10**6)
        reads.clear()
        winners.append(race(trials, cuts, alpha=0.0))
        sums.append([trials.scores(cut).sums for cut in cuts])
    looks = trials.num_looks
    matrices = [reads[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(6)]
    assert matrices == [looks] * 6
    assert winners[0] == winners[1]
    np.testing.assert_array_equal(*sums)


def test_states_that_cuts_share_are_made_once(folder, monkeypatch):  # noqa: F811
    streamed, _, tokenizer = both(folder)
    judge = judge_of("loss", tokenizer, TEXTS, tokens=Tokens(12, 4))
    trials, ran = Trials(Layerwise(streamed), judge, memory=10**6), []
    run = trials.model.run

    def counting(batch, states, layers, **options):
        ran.append(layers)
        return run(batch, states, layers, **options)

    monkeypatch.setattr(trials.model, "run", counting)
    cuts = [(), (1,), (1, 2), (0, 5), (3,), (3, 4)]
    trials.judge_together(cuts, 1)
    paths = map(trials.path, cuts)
    assert len(ran) == len({path[:depth] for path in paths for depth in range(1, len(path) + 1)})
    assert sorted(ran) == ran  # and each layer at one time


def test_a_race_that_was_killed_goes_on_to_the_same_plan(folder, raced):  # noqa: F811
    (streamed, _, tokenizer), (expected, _) = both(folder), raced
    store, read = MemoryStore(), []
    for _ in range(20):
        store.left, before = 8, reading_of(streamed).bytes_read
        try:
            found, _ = verified(streamed, tokenizer, 2, store=store)
            break
        except Killed:
            read.append(reading_of(streamed).bytes_read - before)
    assert found == expected
    assert len(read) > 1


def test_a_cut_that_cannot_be_judged_stops_no_other(folder):  # noqa: F811
    streamed, _, tokenizer = both(folder)
    judge = judge_of("loss", tokenizer, TEXTS, tokens=Tokens(12, 4))
    trials = Trials(Layerwise(streamed), judge)
    measure, judged = trials.measure_states, []

    def failing(index, states):
        judged.append(index)
        if len(judged) == 1:
            raise ModelError("the score is not finite")
        return measure(index, states)

    trials.measure_states = failing
    trials.judge_together([(1,), (2,)], 1)
    with pytest.raises(ModelError, match="not finite"):
        trials.scores((1,), 1)
    assert np.isfinite(trials.scores((2,), 1).sums).any()
    assert len(judged) == 2


def test_a_cut_without_a_layer_before_it_stops_no_other(folder):  # noqa: F811
    streamed, whole, tokenizer = both(folder)
    verifier, plain = (prepared(model, tokenizer) for model in (streamed, whole))
    verifier.patched.judge_together([(0, 1), (2, 4)])
    with pytest.raises(PatchError, match="no layer before the block"):
        verifier.scores((0, 1), after="patch")
    sums = [one.scores((2, 4), after="patch").sums for one in (verifier, plain)]
    np.testing.assert_array_equal(*sums)


def test_a_patch_of_a_streamed_model_is_undone(folder):  # noqa: F811
    streamed, _, tokenizer = both(folder)
    before = evaluate_loss(streamed, tokenizer, TEXTS[:8], max_length=12)
    verifier = prepared(streamed, tokenizer)
    with verifier.patch.patched(Plan.of(6, [2, 4])):
        changed = [list(changed_weights(layer)) for layer in find_layers(streamed).modules]
        assert changed == [[], ["mlp.down_proj.weight"], [], ["mlp.down_proj.weight"], [], []]
        assert evaluate_loss(streamed, tokenizer, TEXTS[:8], max_length=12) != before
    assert not any(map(changed_weights, find_layers(streamed).modules))
    assert evaluate_loss(streamed, tokenizer, TEXTS[:8], max_length=12) == before


SEARCHES = {"greedy", "evolution", "mask_regression"}
"""They judge cuts as ``exhaustive`` does."""


@pytest.mark.parametrize("searches", mostly_slow([False, True], [False]))
def test_criteria_of_a_streamed_model_choose_the_same(folder, searches):  # noqa: F811
    streamed, whole, tokenizer = both(folder)
    subjects = [
        replace(prepared(model, tokenizer, after="none").subject, sizes=(2,))
        for model in (streamed, whole)
    ]
    for criterion in BUILT_IN:
        if (criterion.name in SEARCHES) is not searches:
            continue
        if criterion.name == "taylor":
            with pytest.raises(CriterionError, match=r"offloaded.*leave out taylor"):
                criterion.plans(subjects[0])
        else:
            assert criterion.plans(subjects[0]) == criterion.plans(subjects[1])
