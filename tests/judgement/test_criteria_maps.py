"""Criteria by linear maps against their slow twins."""

import numpy as np
import pytest
import torch

from shallower.errors import CriterionError, ModelError
from shallower.judgement import kept_states
from shallower.judgement.criteria import criteria
from tests.conftest import tiny_llama
from tests.documents import documents
from tests.judgement import twins
from tests.judgement.test_criteria import MODELS, SUBJECTS
from tests.judgement.test_trials import Counted
from tests.judgement.toy import make_subject

LAST = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}
FEW = documents(32)


@pytest.fixture(params=SUBJECTS, ids=str, scope="module")
def subject(request, words):
    name, dtype = request.param
    return make_subject(MODELS[name]().to(dtype), words, FEW, batch_size=6)


def hooked_inputs(subject):
    """For every layer and text what the last matrix of the feed-forward is given, (T, F)."""
    taken, found = [], []
    for layer in subject.decoder.layers.modules:
        module = layer.get_submodule(LAST[subject.decoder.config.model_type])
        handle = module.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
        of_texts = {}
        for batch in subject.batches:
            taken.clear()
            with torch.no_grad():
                subject.decoder.model(
                    input_ids=torch.from_numpy(batch.input_ids),
                    attention_mask=torch.from_numpy(batch.attention_mask),
                )
            inputs = taken[0].double().numpy().reshape(*batch.input_ids.shape, -1)
            for row, text in enumerate(batch.samples):
                of_texts[int(text)] = inputs[row, batch.attention_mask[row] == 1]
        found.append(of_texts)
        handle.remove()
    return found


def assert_costs(costs, expected, errors):
    upper = np.triu_indices(len(expected), 1)
    np.testing.assert_allclose(costs.blocks[upper], expected[upper], rtol=1e-4)
    np.testing.assert_allclose(costs.stderr[upper], errors[upper], rtol=1e-3)


def test_linear_map(subject, states):
    costs = criteria["linear_map"].costs(subject)
    assert_costs(costs, *twins.linear_map(states, subject.batches))
    assert (costs.metric, costs.strategy, str(costs.positions)) == ("linear_map", "costs", "all")


def test_reachable(subject, states):
    costs = criteria["reachable"].costs(subject)
    assert_costs(costs, *twins.reachable(states, subject.batches, hooked_inputs(subject)))
    assert np.isnan(costs.blocks[0, 1:]).all()
    assert np.isfinite(costs.blocks[np.triu_indices(subject.num_layers + 1, 1)][6:]).any()


@pytest.mark.parametrize("name", ["linear_map", "reachable"])
def test_tokens_beyond_the_bound_are_left_out_evenly(words, name, monkeypatch):
    monkeypatch.setattr(kept_states, "FIT_TOKENS", 60)
    monkeypatch.setattr(kept_states, "HELD_OUT_TOKENS", 20)
    subject = make_subject(tiny_llama(3), words, FEW, batch_size=6)
    states = twins.hooked_states(
        subject.decoder.model, subject.decoder.layers.modules, subject.batches
    )
    monkeypatch.setattr(twins.kept, "__defaults__", (60, 20))
    if name == "linear_map":
        expected = twins.linear_map(states, subject.batches)
    else:
        expected = twins.reachable(states, subject.batches, hooked_inputs(subject))
    assert_costs(criteria[name].costs(subject), *expected)
    kept = kept_states.kept_states(subject)
    assert len(kept.fitted[0]) == 60
    assert len(kept.held_out[0]) == 20
    assert set(kept.tokens.texts) == set(range(8))


def test_only_some_texts_are_run_where_they_are_long(words, monkeypatch):
    subject = make_subject(tiny_llama(2), words, FEW, batch_size=6)
    lengths = [int(n) for batch in subject.batches for n in batch.attention_mask.sum(axis=1)]
    monkeypatch.setattr(kept_states, "TOKENS_RUN", sum(lengths) // 2)
    tokens = kept_states.kept_states(subject).tokens
    ran = [int(n) for batch in tokens.batches for n in batch.attention_mask.sum(axis=1)]
    assert ran == [lengths[round(i * 31 / 15)] for i in range(16)]
    assert all(batch.attention_mask.any(axis=0).all() for batch in tokens.batches)
    kept = sum(int(mask.sum()) for mask in tokens.fitted + tokens.held_out)
    assert kept == sum(ran) - len(ran)


@pytest.mark.parametrize("name", ["linear_map", "reachable"])
def test_tokens_with_massive_activations_are_left_out(words, name):
    model = tiny_llama(3)
    with torch.no_grad():
        model.model.embed_tokens.weight[[7, 8, 9]] *= 1000
    subject = make_subject(model, words, FEW, batch_size=6)
    states = twins.hooked_states(model, subject.decoder.layers.modules, subject.batches)
    if name == "linear_map":
        expected = twins.linear_map(states, subject.batches)
    else:
        expected = twins.reachable(states, subject.batches, hooked_inputs(subject))
    assert_costs(criteria[name].costs(subject), *expected)
    tokens = kept_states.kept_states(subject).tokens
    ids = [
        batch.input_ids[mask]
        for masks in (tokens.fitted, tokens.held_out)
        for batch, mask in zip(tokens.batches, masks, strict=True)
    ]
    later = [
        i for b in subject.batches for row in zip(b.input_ids, b.attention_mask, strict=True)
        for i in row[0][1 : row[1].sum()]
    ]  # fmt: skip
    assert sorted(np.concatenate(ids)) == sorted(i for i in later if i not in (7, 8, 9))
    assert {7, 8, 9} < set(later)


def test_two_texts_are_held_out_however_long_they_are(words, monkeypatch):
    monkeypatch.setattr(kept_states, "TOKENS_RUN", 10)
    subject = make_subject(tiny_llama(2), words, FEW, batch_size=6)
    tokens = kept_states.kept_states(subject).tokens
    assert sum(map(len, tokens.batches)) == 8
    assert set(tokens.texts) == {0, 1}


def test_both_share_one_pass(words):
    model = tiny_llama(3)
    subject, counted = make_subject(model, words, FEW), Counted(model)
    with subject.counting():
        criteria["linear_map"].plans(subject)
    assert counted.runs == subject.ran == 3 * (32 + 2)
    with subject.counting():
        criteria["reachable"].plans(subject)
    assert counted.runs == 3 * (32 + 2) + 2 * (32 + 5)
    assert subject.ran == counted.runs  # what they share counts for each


@pytest.mark.parametrize("name", ["linear_map", "reachable"])
def test_too_few_texts_are_refused(words, name):
    with pytest.raises(CriterionError, match="7 texts, too few to fit a map"):
        criteria[name].costs(make_subject(tiny_llama(2), words, FEW[:7]))


@pytest.mark.parametrize("name", ["linear_map", "reachable"])
def test_a_state_that_is_not_finite_is_refused(words, name):
    model = tiny_llama(2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match="state 2 is not finite"):
        criteria[name].costs(make_subject(model, words, FEW))


def test_layers_that_write_by_no_plain_map_are_not_measured(words):
    model = tiny_llama(3)
    subject = make_subject(model, words, FEW)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: output.abs())
    costs = criteria["reachable"].costs(subject)
    handle.remove()
    assert np.isnan(costs.blocks[:2]).all()
    assert np.isfinite(costs.blocks[2, 3])
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _m, _a, output: output.abs())
    with pytest.raises(CriterionError, match="feed-forwards that write by plain linear maps"):
        criteria["reachable"].costs(make_subject(model, words, FEW))
