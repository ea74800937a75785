"""Criteria of similarity, of single layers and of weights, against their slow twins."""

import copy

import numpy as np
import pytest
import torch

from shallower.errors import CriterionError, ModelError, RejectedSamplesWarning, StatesError
from shallower.judgement.criteria import NAMED, criteria, expert_criteria
from shallower.judgement.criteria.baselines import NUM_TEXTS
from shallower.settings.studies import CRITERIA, EXPERT_CRITERIA
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import TEXTS, documents
from tests.families import random_model
from tests.judgement import twins
from tests.judgement.test_trials import Counted
from tests.judgement.toy import make_subject

DTYPES = [torch.float32, torch.bfloat16]


def tiny_gpt2():
    """Layers that return tuples on some versions, and write by transposed weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
SUBJECTS = mostly_slow(
    (((m, d),) for m in MODELS for d in DTYPES),
    [(("llama", torch.bfloat16),), (("gpt2", torch.float32),)],
)


@pytest.fixture(params=SUBJECTS, ids=str, scope="module")
def subject(request, words):
    name, dtype = request.param
    return make_subject(MODELS[name]().to(dtype), words, TEXTS, batch_size=5)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("angular", 1e-7), ("cosine", 1e-7), ("relative_l2", 1e-6)]
)
def test_the_ends_of_blocks(subject, states, name, tolerance):
    costs = criteria[name].costs(subject)
    expected = getattr(twins, name)(states)
    np.testing.assert_allclose(np.triu(costs.blocks, 1), expected, rtol=0, atol=tolerance)
    assert (costs.metric, costs.strategy, str(costs.positions)) == (name, "similarity", "last")
    assert costs.model == subject.decoder.identity
    assert costs.texts == subject.texts


def test_cka(subject, states):
    costs = criteria["cka"].costs(subject)
    texts = [int(text) for batch in subject.batches for text in batch.samples]
    minibatch = np.array([states[text][:, -1] for text in texts])
    np.testing.assert_allclose(np.triu(costs.blocks, 1), twins.cka([minibatch]), atol=1e-9)


def test_cka_of_several_minibatches_that_are_of_one_size(words):
    subject = make_subject(tiny_llama(2), words, documents(130), batch_size=8)
    states = twins.hooked_states(
        subject.decoder.model, subject.decoder.layers.modules, subject.batches
    )
    texts = [int(text) for batch in subject.batches for text in batch.samples]
    last = np.array([states[text][:, -1] for text in texts])
    expected = twins.cka([last[:44], last[44:88], last[88:]])
    costs = criteria["cka"].costs(subject)
    np.testing.assert_allclose(np.triu(costs.blocks, 1), expected, atol=1e-9)


@pytest.mark.parametrize("name", ["block_influence", "magnitude"])
def test_single_layers_over_all_tokens(subject, states, name):
    costs = criteria[name].costs(subject)
    means, errors = getattr(twins, name)(states)
    np.testing.assert_allclose(np.diag(costs.blocks, 1), means, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.diag(costs.stderr, 1), errors, rtol=1e-5)
    assert (costs.metric, costs.strategy, str(costs.positions)) == (name, "costs", "all")
    assert costs.of_single_layers


def test_xmerge(subject, states):
    costs = criteria["xmerge"].costs(subject)
    np.testing.assert_allclose(np.diag(costs.blocks, 1), twins.xmerge(states), rtol=1e-5, atol=1e-6)


def test_taylor(subject):
    model = copy.deepcopy(subject.decoder.model).double()
    layers = subject.decoder.layers.path
    expected = twins.taylor(model, model.get_submodule(layers), few(subject.batches))
    costs = np.diag(criteria["taylor"].costs(subject).blocks, 1)
    coarse = subject.decoder.model.dtype == torch.bfloat16
    np.testing.assert_allclose(costs, expected, rtol=0.02 if coarse else 1e-5)


def few(batches):
    """The texts that are differentiated: 16 of 24, evenly."""
    single = [text for batch in batches for text in batch.split(1)]
    return [single[round(i * 23 / 15)] for i in range(16)]


def test_taylor_leaves_the_model_as_it_was(words):
    model = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    model.model.norm.weight.requires_grad_(False)
    model.train()
    before = [(p.requires_grad, p.grad, p.clone()) for p in model.parameters()]
    criteria["taylor"].costs(make_subject(model, words, TEXTS))
    assert all(module.training for module in model.modules())
    for parameter, (requires, gradient, value) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == requires
        assert parameter.grad is gradient
        assert torch.equal(parameter, value)
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_weights(subject):
    names = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}
    both = names[subject.decoder.config.model_type]
    expected = twins.weights(
        [
            [layer.get_submodule(name).weight.detach().float().numpy() for name in both]
            for layer in subject.decoder.layers.modules
        ]
    )
    costs = np.diag(criteria["weights"].costs(subject).blocks, 1)
    np.testing.assert_allclose(costs, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["angular", "cka", "block_influence", "xmerge", "taylor", "linear_map", "weights"]
)
def test_the_layers_of_a_criterion_are_those_of_a_lone_run(words, name):
    model = tiny_llama(3)
    subject, counted = make_subject(model, words, documents(32), batch_size=5), Counted(model)
    with subject.counting():
        criteria[name].plans(subject)
    backwards = 2 * 3 * NUM_TEXTS * (name == "taylor")
    assert subject.ran == counted.runs + backwards > 0
    before = counted.runs
    for other in ("cosine", "relative_l2", "magnitude"):
        criteria[other].plans(subject)
    ran = {"angular": 3 * 34, "cka": 3 * 34, "block_influence": 3 * 32, "xmerge": 3 * 32}
    assert counted.runs - before == ran.get(name, 3 * (32 + 34))  # a pass is made once


def test_cka_of_three_texts_is_refused(words):
    subject = make_subject(tiny_llama(2), words, TEXTS[:3])
    with pytest.raises(CriterionError, match="3 texts, too few: give at least 4"):
        criteria["cka"].costs(subject)
    assert criteria["angular"].costs(subject).best_block(1)


@pytest.mark.parametrize("name", ["block_influence", "magnitude", "xmerge"])
def test_a_text_with_a_state_of_zeros_is_left_out_and_named(words, name):
    model = tiny_llama(2)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
    texts = ["w1 w2 w3", "w4 w7 w5", "w6 w8"]
    subject = make_subject(model, words, texts)
    with pytest.warns(RejectedSamplesWarning, match="1 of 3 samples rejected: sample 1: a state"):
        costs = criteria[name].costs(subject)
    expected = criteria[name].costs(make_subject(model, words, [texts[0], texts[2]]))
    np.testing.assert_allclose(costs.blocks, expected.blocks, atol=1e-12)
    with pytest.raises(StatesError, match="nothing to compare: 1 of 1"):
        criteria[name].costs(make_subject(model, words, texts[1:2]))


def test_a_gradient_that_is_not_finite_is_refused(words):
    model = tiny_llama(2)
    subject = make_subject(model, words, TEXTS)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="gradient of layer 0 is not finite"):
        criteria["taylor"].costs(subject)


def test_layers_that_write_by_no_plain_map_are_refused(words):
    subject = make_subject(tiny_llama(2), words, TEXTS)
    for layer in subject.decoder.layers.modules:
        layer.mlp.register_forward_hook(lambda _module, _args, output: output.abs())
    with pytest.raises(CriterionError, match="this model has 0"):
        criteria["weights"].costs(subject)


ALL = ("angular", "cka", "block_influence", "magnitude", "xmerge", "taylor")
MAPS = ("linear_map", "reachable", "weights")


@pytest.mark.parametrize(
    ("family", "refused", "missing"),
    [
        # attention and feed-forward side by side
        pytest.param("falcon", (), (), marks=pytest.mark.slow),
        ("mixtral", ("reachable", "weights"), ()),  # experts
        ("qwen3_moe, every second", (), ("reachable", "weights")),
        ("gemma4_text, shared keys and values", (*ALL[2:5], *MAPS), ()),  # not the stream alone
    ],
)
def test_families_that_say_less_than_others(words, family, refused, missing):
    subject = make_subject(random_model(family), words, documents(12))
    for name in (*ALL, *MAPS):
        if name in refused:
            with pytest.raises((CriterionError, ModelError)):
                criteria[name].costs(subject)
            continue
        single = np.diag(criteria[name].costs(subject).blocks, 1)
        assert np.isfinite(single[1:]).all() == (name not in missing)
        assert np.isfinite(single).any()


def test_the_names_that_are_known_without_torch_are_those_of_the_tables():
    assert (*criteria, *NAMED) == CRITERIA
    assert tuple(expert_criteria) == EXPERT_CRITERIA
