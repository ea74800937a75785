"""Searches over sets of layers, against plain ones by models that are really cut."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

import shallower as sh
from shallower import Block, LayersError
from shallower.judgement.criteria import criteria
from shallower.judgement.criteria.searches import (
    DROPPED,
    draw_masks,
    mutations,
    ridge_regression,
)
from shallower.judgement.trials import Trials
from tests.conftest import tiny_llama, word_tokenizer
from tests.documents import documents
from tests.judgement import toy
from tests.judgement.test_trials import Memory, key_of

SEARCHES = ("greedy", "exhaustive", "evolution", "deepest", "random")
TEXTS = documents(20, seed=3)
WORDS = word_tokenizer()
NUM_LAYERS = 6


@pytest.fixture
def subject(words):
    return toy.make_subject(tiny_llama(NUM_LAYERS), words, TEXTS, sizes=(1, 2, 4), batch_size=10)


def of_sizes(subject, *sizes):
    subject.sizes = sizes
    return subject


def plain_loss(subject, dropped):
    """The loss of a model that is really cut."""
    model = subject.decoder.model
    with sh.without_layers(model, sorted(dropped)):
        return sh.evaluate_loss(model, WORDS, TEXTS).nats


def plain_greedy(loss, n):
    gone = []
    for _ in range(n):
        left = [layer for layer in range(NUM_LAYERS) if layer not in gone]
        losses = [loss(frozenset([*gone, layer])) for layer in left]
        gone.append(left[int(np.argmin(losses))])
    return tuple(sorted(gone))


def plain_exhaustive(loss, n):
    starts = range(NUM_LAYERS - n + 1)
    losses = [loss(frozenset(range(start, start + n))) for start in starts]
    start = int(np.argmin(losses))
    return tuple(range(start, start + n))


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 3))])
@pytest.mark.parametrize(
    ("name", "plain"), [("greedy", plain_greedy), ("exhaustive", plain_exhaustive)]
)
def test_they_choose_what_plain_searches_choose(words, seed, name, plain):
    model = tiny_llama(NUM_LAYERS, seed=seed)
    subject = toy.make_subject(model, words, TEXTS, sizes=(1, 3), batch_size=10)
    found, loss = criteria[name].plans(subject), cache(partial(plain_loss, subject))
    assert {n: plan.dropped for n, plan in found.items()} == {n: plain(loss, n) for n in (1, 3)}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_plan_names_its_criterion_and_does_not_depend_on_other_sizes(subject, name):
    plans = criteria[name].plans(of_sizes(subject, 1, 4))
    assert sorted(plans) == [1, 4]
    for n, plan in plans.items():
        assert len(plan.dropped) == n
        assert plan.metric == name
        assert plan.model == subject.decoder.identity
        assert plan.strategy == {"deepest": "deepest", "random": "random"}.get(name, "search")
        fresh = toy.make_subject(subject.decoder.model, WORDS, TEXTS, batch_size=10)
        assert criteria[name].plans(of_sizes(fresh, n)) == {n: plan}


@pytest.mark.parametrize("name", [*SEARCHES, "one_shot", "mask_regression"])
def test_all_layers_but_one_can_go(subject, name):
    (plan,) = criteria[name].plans(of_sizes(subject, 5)).values()
    assert len(plan.dropped) == 5


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("n", [0, 6, 7])
def test_sizes_that_cannot_be_are_refused(subject, name, n):
    with pytest.raises(LayersError):
        criteria[name].plans(of_sizes(subject, n))


def test_a_block_that_was_found_has_its_score(subject):
    for name in ("exhaustive", "greedy"):
        block = criteria[name].plans(of_sizes(subject, 1))[1].blocks[0]
        assert block.score == pytest.approx(plain_loss(subject, block.layers), rel=1e-6)
        assert block.stderr > 0


def test_what_a_search_costs_does_not_depend_on_what_was_made_before(subject):
    costs = {}
    for order in (SEARCHES, SEARCHES[::-1]):
        shared = toy.make_subject(subject.decoder.model, WORDS, TEXTS, batch_size=10)
        for name in order:
            with shared.trials.counted() as count:
                criteria[name].plans(of_sizes(shared, 3))
            costs.setdefault(name, set()).add(count.layer_forwards)
    assert all(len(found) == 1 for found in costs.values())
    assert costs["deepest"] == costs["random"] == {0}


@pytest.mark.parametrize("name", ["greedy", "exhaustive", "evolution", "one_shot"])
def test_a_search_that_was_killed_goes_on_to_the_same_plan_and_cost(subject, name):
    def search(journal):
        trials = Trials(subject.layerwise, subject.trials.judge, journal=journal)
        again = replace(subject, trials=trials, sizes=(3,), made={})
        with trials.counted() as count:
            plan = criteria[name].plans(again)[3]
        return plan, count.layer_forwards

    whole = Memory()
    expected = search(whole)
    for kept in (len(whole) // 3, len(whole) - 1, len(whole)):
        rest = Memory(whole[:kept])
        assert search(rest) == expected
        assert sorted(map(key_of, rest)) == sorted(map(key_of, whole))


def test_mutations_exchange_a_few_layers():
    parent, seen = frozenset({1, 4, 5, 9}), {frozenset({1, 4, 5, 8})}
    found = mutations(parent, 12, np.random.default_rng(0), seen=seen | {parent})
    assert len(found) == len(set(found)) == 16
    for cut in found:
        assert len(cut) == 4
        assert 1 <= len(cut - parent) <= 3
        assert cut not in seen
    assert mutations(frozenset({0}), 2, np.random.default_rng(0), seen={frozenset({1})}) == []
    assert mutations(frozenset({0}), 2, np.random.default_rng(0), seen=set()) == [frozenset({1})]


def test_random_layers_are_those_of_the_seed(subject):
    drawn = set()
    for seed in range(40):
        again = replace(subject, sizes=(2,), seed=seed, made={})
        drawn.add(criteria["random"].plans(again)[2].dropped)
    assert 10 < len(drawn) <= 15


def test_the_deepest_are_those_before_the_last(subject):
    assert criteria["deepest"].plans(subject)[2].blocks == (Block(3, 5),)


# Costs of single layers.
def test_one_shot_is_the_loss_without_a_layer_less_that_of_all(subject):
    costs = criteria["one_shot"].costs(subject)
    whole = sh.evaluate_loss(subject.decoder.model, WORDS, TEXTS).nats
    for layer in range(NUM_LAYERS):
        expected = plain_loss(subject, [layer]) - whole
        assert costs.blocks[layer, layer + 1] == pytest.approx(expected, abs=2e-6)
        paired = subject.trials.scores((layer,)).minus(subject.trials.scores(()))
        assert costs.stderr[layer, layer + 1] == paired.stderr > 0
    assert costs.of_single_layers
    assert costs.metric == "one_shot"


def test_one_shot_costs_a_path_and_all_that_follows_each_layer(subject):
    with subject.trials.counted() as count:
        criteria["one_shot"].costs(subject)
    assert count.layer_forwards == len(TEXTS) * NUM_LAYERS * (NUM_LAYERS + 1) // 2


def plain_ridge(masks, scores, ridge):
    """Normal equations of a regression whose intercept is not shrunk."""
    design = np.column_stack([np.ones(len(masks)), masks.astype(float)])
    penalty = np.diag([0.0, *[ridge] * masks.shape[1]])
    return np.linalg.solve(design.T @ design + penalty, design.T @ scores)


def test_the_regression_has_the_ridge_of_the_least_error_left_out():
    random = np.random.default_rng(0)
    masks = draw_masks(7, 0)
    scores = 4 + masks @ random.exponential(1, 7) + random.normal(0, 1, len(masks))
    unit = np.mean(np.linalg.svd(masks - masks.mean(axis=0), compute_uv=False) ** 2)
    errors = {}
    for ridge in np.logspace(-4, 4, 33) * unit:
        left_out = []
        for one in range(len(masks)):
            # The masks are centred once, as in the closed form.
            centred = masks - masks.mean(axis=0)
            rest = np.delete(np.arange(len(masks)), one)
            found = plain_ridge(centred[rest], scores[rest], ridge)
            left_out.append(scores[one] - found[0] - centred[one] @ found[1:])
        errors[ridge] = np.mean(np.square(left_out))
    expected = plain_ridge(masks, scores, min(errors, key=errors.get))[1:]
    np.testing.assert_allclose(ridge_regression(masks, scores), expected, rtol=1e-8)


def test_the_regression_finds_layers_that_add_up():
    worth = np.array([3.0, 0.5, 0.0, 1.0, 2.0, 0.25, 4.0])
    masks = draw_masks(7, 1)
    np.testing.assert_allclose(ridge_regression(masks, masks @ worth + 5), worth, atol=0.01)


@pytest.mark.parametrize("num_layers", [2, 3, 6, 30, 80])
def test_masks_drop_and_keep_every_layer(num_layers):
    masks = draw_masks(num_layers, 0)
    assert masks.shape == (max(128, 4 * num_layers), num_layers)
    for axis in (0, 1):
        assert masks.any(axis).all()
        assert not masks.all(axis).any()
    if num_layers >= 30:
        assert masks.mean() == pytest.approx(DROPPED, abs=0.02)


def test_mask_regression_is_a_regression_on_the_first_items(subject):
    costs = criteria["mask_regression"].costs(subject)
    masks = draw_masks(NUM_LAYERS, 0)
    scores = [subject.trials.scores(np.flatnonzero(m).tolist(), looks=1).mean for m in masks]
    expected = ridge_regression(masks, np.array(scores))
    np.testing.assert_array_equal(np.diag(costs.blocks, 1), expected)


# A network whose answer is known.
@pytest.fixture(scope="module")
def known(words):
    model = toy.toy_model()
    return toy.make_subject(model, words, toy.toy_texts(model), sizes=(1, 2, 3))


@pytest.mark.parametrize("name", ["one_shot", "greedy", "exhaustive", "evolution"])
def test_a_layer_that_does_nothing_goes_first(known, name):
    assert criteria[name].plans(known)[1].dropped in [(toy.IDENTITY,), (toy.SCALES,)]


@pytest.mark.parametrize("name", ["one_shot", "greedy"])
def test_two_that_do_nothing_go_together(known, name):
    assert criteria[name].plans(known)[2].dropped == (toy.IDENTITY, toy.SCALES)


def test_a_regression_prefers_layers_that_do_nothing_to_all_that_do(known):
    # Beside other layers that are gone, each half of the pair costs little more than nothing: the
    # loss is that of a guess already. So the regression does not tell them from the two.
    costs = np.diag(criteria["mask_regression"].costs(known).blocks, 1)
    nothing = [toy.IDENTITY, toy.SCALES]
    others = [layer for layer, kind in enumerate(toy.KINDS) if kind == "plain"]
    assert np.abs(costs[nothing]).max() < 0.1
    assert costs[others].min() > 0.1


def test_two_that_cancel_are_found_as_a_block(known):
    assert criteria["exhaustive"].plans(known)[2].blocks == (Block(*toy.PAIR),)


def test_evolution_finds_layers_that_do_nothing_wherever_they_are(known):
    for n in (2, 3):
        dropped = criteria["evolution"].plans(known)[n].dropped
        lost = known.trials.scores(dropped).minus(known.trials.scores(()))
        best = known.trials.scores((toy.IDENTITY, toy.SCALES)).minus(known.trials.scores(()))
        assert lost.mean <= best.mean + (n == 3) * 0.1
