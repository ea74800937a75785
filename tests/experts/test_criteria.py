"""Which experts go: criteria against their twins, groups of a router, and plans."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shallower as sh
from shallower.experts.criteria import (
    CRITERIA,
    chosen_experts,
    expert_scores,
    expert_stderr,
    experts_to_drop,
)
from shallower.experts.statistics import VALUES, ExpertStatistics, pair_places
from shallower.models.experts import find_experts
from shallower.values.experts import Routing
from tests.cutting.mixtures import mixture
from tests.documents import documents

TEXTS = documents(20)
OF_ACTIVATIONS = ["ean", "man", "msan", "reap", "easy-ep", "reconstruction"]
BY_SCORE = [name for name, row in CRITERIA.items() if row.kind != "set"]


def statistics(tokens, num_experts=6, layers=(1, 3), **routing):
    """Of made-up tokens, (layer's place, text, expert, g, norm, s) each."""
    found = ExpertStatistics(layers, Routing(num_experts, routing.pop("chosen", 2), **routing))
    for place in range(len(layers)):
        texts = sorted({text for _, text, *_ in tokens})
        counts = np.zeros((len(texts), num_experts), np.int64)
        values = np.zeros((*counts.shape, len(VALUES)))
        for where, text, expert, g, f, s in tokens:
            if where == place:
                counts[texts.index(text), expert] += 1
                values[texts.index(text), expert] += (g, f, f * f, g * f, g * g * f * f, s * g * f)
        of_one = pair_places(*[np.arange(num_experts)] * 2, num_experts)
        pairs = [
            np.zeros((len(texts), num_experts * (num_experts + 1) // 2, *some))
            for some in ((), (1,))
        ]
        pairs[0][:, of_one], pairs[1][:, of_one, 0] = counts, values[..., 4]
        found.add(place, counts, values, pairs=(pairs[0].astype(np.uint64), pairs[1]))
    found.aimer = np.random.default_rng(0).uniform(0.1, 0.9, found.aimer.shape)
    return found


number = st.floats(0.1, 3)
token = st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 5), number, number, number)


def slow_scores(tokens, criterion, num_experts=6):
    """By the words of the papers, a loop over tokens."""
    scores = np.full((2, num_experts), np.nan)
    for place, expert in itertools.product(range(2), range(num_experts)):
        mine = [(g, f, s) for where, _, e, g, f, s in tokens if (where, e) == (place, expert)]
        num = len(mine)
        total = {
            "frequency": num,
            "soft-frequency": sum(g for g, _, _ in mine),
            "ean": sum(f for _, f, _ in mine),
            "man": sum(f for _, f, _ in mine) / num if num else np.nan,
            "msan": sum(f**2 for _, f, _ in mine) / num if num else np.nan,
            "reap": sum(g * f for g, f, _ in mine) / num if num else np.nan,
            "easy-ep": sum(s * g * f for g, f, s in mine),
        }
        scores[place, expert] = total[criterion]
    return scores


@given(st.lists(token, min_size=1, max_size=60), st.sampled_from(list(CRITERIA)[:7]))
def test_scores_are_those_of_a_slow_twin(tokens, criterion):
    found = expert_scores(statistics(tokens), criterion)
    np.testing.assert_allclose(found, slow_scores(tokens, criterion), rtol=1e-12)


@given(st.lists(token, min_size=1, max_size=60), st.sampled_from(BY_SCORE), st.integers(1, 4))
def test_those_without_a_token_go_and_then_the_lowest(tokens, criterion, count):
    found = statistics(tokens)
    dropped = experts_to_drop(found, count, criterion=criterion, seed=3)
    assert dropped.criterion == criterion
    scores = expert_scores(found, criterion, 3)
    assert [*dropped.by_layer] == [1, 3]
    reads_texts = criterion not in ("aimer", "random")
    unseen = (found.counts == 0) & reads_texts
    for row, none, (layer, gone) in zip(scores, unseen, dropped.by_layer.items(), strict=True):
        keys = -row if criterion == "aimer" else row
        order = sorted(range(6), key=lambda e: (not none[e], 0 if none[e] else keys[e], e))
        assert gone == tuple(sorted(order[:count]))
        assert len(dropped.kept(layer)) == 6 - count
    rows = chosen_experts(found, dropped, 3)
    for one, row, error in zip(rows, scores, expert_stderr(found, criterion), strict=True):
        assert one.experts == dropped.by_layer[one.layer]
        np.testing.assert_array_equal(one.scores, row[list(one.experts)])
        kept = list(dropped.kept(one.layer))
        sign = -1 if criterion == "aimer" else 1
        if not np.isnan(one.last.mean) and not np.isnan(one.next.mean):
            assert sign * one.last.mean == np.nanmax(sign * row[list(one.experts)])
            assert sign * one.next.mean == np.nanmin(sign * row[kept])
            assert any(np.array_equal(one.next.stderr, each, equal_nan=True) for each in error)


def test_experts_that_were_sent_nothing_are_named():
    found = statistics([(0, 0, 2, 1, 1, 1), (0, 1, 3, 1, 1, 1), (1, 0, 0, 1, 1, 1)])
    assert found.unrouted == {1: (0, 1, 4, 5), 3: (1, 2, 3, 4, 5)}
    for criterion in (*OF_ACTIVATIONS, "frequency", "soft-frequency"):
        gone = experts_to_drop(found, 2, criterion=criterion).by_layer
        assert gone == {1: (0, 1), 3: (1, 2)}, criterion


@given(
    st.integers(0, 99),
    st.sampled_from([(2, 2, 1, 2), (4, 2, 1, 4), (4, 4, 2, 4), (8, 2, 1, 2), (3, 6, 4, 3)]),
    st.booleans(),
)
def test_as_many_of_each_group_go_and_the_router_can_choose(seed, groups, two_decide):
    """Against all choices: of those that leave groups as large, the one of the lowest sum."""
    size, num_groups, taken, chosen = groups
    number = size * num_groups
    routing = {"num_groups": num_groups, "groups_chosen": taken, "two_decide": two_decide}
    draws = np.random.default_rng(seed)
    tokens = [(0, 0, e, 1.0, f, 1.0) for e, f in enumerate(draws.permutation(number) + 1.0)]
    found = statistics(tokens, number, (0,), chosen=chosen, **routing)
    scores = found.mean("norm")[0]
    for count in range(1, number):
        rest = number - count
        fits = count % num_groups == 0 and rest // num_groups >= (2 if two_decide else 1)
        fits = fits and rest // num_groups * taken >= chosen and rest >= chosen
        if not fits:
            with pytest.raises(sh.ExpertsError):
                experts_to_drop(found, count, criterion="man")
            continue
        gone = experts_to_drop(found, count, criterion="man").by_layer[0]
        if number <= 12:
            best = min(
                (
                    some
                    for some in itertools.combinations(range(number), count)
                    if _even(some, size)
                ),
                key=lambda some: sum(scores[list(some)]),
            )
            assert gone == best
        assert _even(gone, size, num_groups)


def _even(some, size, num_groups=None):
    counts = np.bincount(np.array(some) // size)
    if num_groups is not None and len(counts) != num_groups:
        return False
    return len(set(counts)) == 1 and len(counts) == (max(some) // size + 1)


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (0, {}, "cannot drop 0 of 6 experts a layer: expected 1 to 5"),
        (6, {}, "cannot drop 6 of 6 experts a layer"),
        (2.0, {}, "cannot drop 2.0 of 6 experts a layer"),
        (5, {}, "keep at least 2"),
        (2, {"criterion": "best"}, "unknown criterion of experts 'best': expected frequency"),
        (2, {"criterion": "random", "seed": -1}, "seed -1"),
        (2, {"gone": (1, 3)}, "no expert is named of a layer that stays"),
    ],
)
def test_what_cannot_be_chosen_is_refused(count, options, words):
    found = statistics([(0, 0, 0, 1, 1, 1)])
    with pytest.raises(sh.ExpertsError, match=words):
        experts_to_drop(found, count, **options)


def test_criteria_without_their_statistics_are_refused():
    found = statistics([(0, 0, 0, 1, 1, 1)])
    found.lose_stream()
    assert found.sums.sums()[..., VALUES.index("moved")].sum() == 0
    found.aimer[1, 2] = np.nan
    with pytest.raises(sh.ExpertsError, match="Choose another criterion than easy-ep"):
        expert_scores(found, "easy-ep")
    with pytest.raises(sh.ExpertsError, match="has not seen the weights"):
        expert_scores(found, "aimer")


def test_a_draw_depends_on_seed_and_layer_alone():
    one, other = statistics([(0, 0, 0, 1, 1, 1)]), statistics([(0, 0, 0, 1, 1, 1)], layers=(3,))
    assert (
        expert_scores(one, "random", 5)[1].tolist() == expert_scores(other, "random", 5)[0].tolist()
    )
    assert (
        expert_scores(one, "random", 5)[0].tolist() != expert_scores(one, "random", 6)[0].tolist()
    )


def planted_products(seed, num_experts, **routing):
    """Statistics with the products of made-up outputs, and those products."""
    added = np.random.default_rng(seed).normal(size=(num_experts, 3)) + 0.5
    products = added @ added.T
    found = statistics([(0, 0, 0, 1, 0, 1)], num_experts, (0,), **routing)
    pairs = products[np.triu_indices(num_experts)]
    found.pairs.update(0, np.ones((1, len(pairs)), np.uint64), pairs[None, :, None])
    np.testing.assert_allclose(found.products()[0], products, rtol=1e-12)
    return found, products


@given(st.integers(0, 999), st.integers(3, 8), st.integers(1, 6))
def test_reconstruction_finds_the_best_set_of_a_few(seed, num_experts, count):
    found, products = planted_products(seed, num_experts, chosen=1)
    count = min(count, num_experts - 1)
    gone = experts_to_drop(found, count, criterion="reconstruction").by_layer[0]
    errors = {
        some: products[np.ix_(some, some)].sum()
        for some in itertools.combinations(range(num_experts), count)
    }
    assert errors[gone] <= min(errors.values()) + 1e-9


@given(st.integers(0, 999), st.integers(1, 8), st.sampled_from([1, 2]))
def test_reconstruction_of_many_takes_one_after_the_other(seed, count, num_groups):
    found, products = planted_products(seed, 12, chosen=1, num_groups=num_groups)
    count *= num_groups if count <= 5 else 1
    if count % num_groups:
        return
    gone = []
    while len(gone) < count:
        free = [
            expert
            for expert in range(12)
            if expert not in gone
            and sum(one * num_groups // 12 == expert * num_groups // 12 for one in gone)
            < count // num_groups
        ]
        gone.append(min(free, key=lambda e: products[np.ix_([*gone, e], [*gone, e])].sum()))
    wanted = tuple(sorted(gone))
    assert experts_to_drop(found, count, criterion="reconstruction").by_layer[0] == wanted


def test_products_of_too_many_pairs_are_not_kept():
    found = ExpertStatistics(range(4), Routing(1024, 2))
    assert found.pairs is None
    with pytest.raises(sh.ExpertsError, match="choose another criterion than reconstruction"):
        experts_to_drop(found, 2, criterion="reconstruction")
    assert found.copy().pairs is None


def test_what_a_set_adds_is_what_the_layers_output_loses(words):
    """In a model: the experts' outputs are set to zero, and the last layer's block is compared."""
    model = mixture("mixtral")
    texts = [text for text in TEXTS if len(text.split()) > 3]
    scanned = sh.scan(model, words, texts, experts=True, batch_size=1)
    one, dropped = find_experts(model)[-1], scanned.plan(experts=2, criterion="reconstruction")
    gone = list(dropped.experts.by_layer[one.layer])
    outputs = {}

    def keep(name):
        seen = outputs.setdefault(name, [])
        handle = one.module.register_forward_hook(lambda *hooked: seen.append(hooked[-1]))
        for text in texts:
            model(**words(text, return_tensors="pt", return_token_type_ids=False))
        handle.remove()
        return torch.cat(seen).detach().double()

    before = keep("before")
    one.module.down_proj.data[gone] = 0
    lost = float((before - keep("after")).square().sum())
    products = scanned.experts.products()[-1]
    np.testing.assert_allclose(products[np.ix_(gone, gone)].sum(), lost, rtol=1e-4)
    least = min(products[np.ix_(some, some)].sum() for some in itertools.combinations(range(6), 2))
    np.testing.assert_allclose(lost, least, rtol=1e-4)


# In models.
PLANTED = {"mixtral": 4, "qwen2_moe": 1, "deepseek_v3": 3, "llama4_text": 2, "dbrx": 5}


@pytest.mark.parametrize("name", PLANTED)
def test_an_expert_that_gives_zeros_goes_first(name, words):
    """By every criterion of activations, if a token is sent to it at all."""
    model, expert = mixture(name), PLANTED[name]
    for one in find_experts(model):
        weights = dict(one.module.named_parameters())
        down = weights.get("down_proj", weights.get("mlp.w2"))
        down.data.unflatten(0, (one.num_experts, -1))[expert] = 0
    scanned = sh.scan(model, words, TEXTS, max_length=12, experts=True)
    routed = [
        layer
        for layer, row in zip(scanned.experts.layers, scanned.experts.counts, strict=True)
        if row[expert]
    ]
    assert len(routed) > len(scanned.experts.layers) // 2
    count = scanned.experts.routing.num_groups
    for criterion in OF_ACTIVATIONS:
        if criterion == "easy-ep" and not scanned.experts.has_stream:
            continue
        gone = scanned.plan(experts=count, criterion=criterion).experts.by_layer
        assert all(expert in gone[layer] for layer in routed), criterion
        if count == 1 and criterion in ("man", "msan", "reap"):
            assert all(gone[layer] == (expert,) for layer in routed), criterion


def test_a_plan_of_experts_is_carried_out(words, tmp_path):
    model = mixture("mixtral")
    scanned = sh.scan(model, words, TEXTS, experts=True)
    plan = scanned.plan(experts=2)
    assert (plan.strategy, plan.metric, plan.blocks) == ("experts", "reap", ())
    assert plan.experts.criterion == "reap"
    plan.save(tmp_path / "plan.json")
    assert sh.Plan.load(tmp_path / "plan.json") == plan
    assert sh.drop_layers(model, plan) == plan
    assert model.config.num_local_experts == 4


def test_layers_and_experts_in_one_plan(words):
    model = mixture("mixtral")
    scanned = sh.scan(model, words, TEXTS, experts=True)
    plan, alone = scanned.plan(3, experts=2, criterion="frequency"), scanned.plan(3)
    assert (plan.blocks, plan.strategy) == (alone.blocks, alone.strategy)
    assert [*plan.experts.by_layer] == [*plan.survivors]
    assert plan.experts.criterion == "frequency"
    sh.drop_layers(model, plan)
    assert len(find_experts(model)) == 5
    assert {one.num_experts for one in find_experts(model)} == {4}
    with pytest.raises(sh.LayersError, match="nothing is to go"):
        scanned.plan()


def test_groups_of_a_model_stay_as_large(words):
    model = mixture("deepseek_v3", n_group=2, topk_group=1)
    scanned = sh.scan(model, words, TEXTS, experts=True)
    groups = scanned.experts.routing.num_groups
    assert groups == 2
    plan = scanned.plan(experts=groups)
    size = 6 // groups
    for gone in plan.experts.by_layer.values():
        assert sorted(expert // size for expert in gone) == [*range(groups)]
    sh.drop_layers(model, plan)
    with pytest.raises(sh.ExpertsError, match=f"drop a multiple of {groups}"):
        scanned.plan(experts=groups + 1)
