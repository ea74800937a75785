"""The way down from a cut, against slopes of the whole forward by autograd."""

import copy

import numpy as np
import pytest
import torch

from shallower.healing import descent
from shallower.healing.changes import Changes
from shallower.healing.descent import RIDGE, Descent, Way, divergence_slopes, rounds, walk
from shallower.healing.patch_states import StateSet, Stored
from shallower.models.layerwise import Layerwise
from shallower.models.residual_writers import Writer
from shallower.texts.batches import TokenBatches
from shallower.values.tokens import Tokens
from tests.documents import TEXTS
from tests.examples import learned_llama, sentences

LAYERS = (1, 4, 5)
"""Layers that are left of six, from the first that moves on; 2 and 3 are gone."""


@pytest.fixture(scope="module")
def model(words):
    """A tiny Llama that has learned something. Tests leave it as it is."""
    return learned_llama(words, num_layers=6, steps=40)


def batches_of(words, texts, batch_size=4):
    return list(TokenBatches(words, texts, Tokens(32, batch_size), min_tokens=2))


def find(model, batches, folder):
    layerwise = Layerwise(model)
    sample = layerwise.embed(batches[0])
    last, start = (Stored(None, batches, sample.shape[-1], sample.dtype) for _ in range(2))
    for index, batch in enumerate(batches):
        start[index] = layerwise.run(batch, layerwise.embed(batch), (0,))
        last[index] = layerwise.run(batch, start[index], range(1, 6))
    ran = []
    with torch.no_grad():
        ways, fall = Descent(
            layerwise, LAYERS, states=StateSet(batches, last, start), folder=folder, ran=ran.append
        ).find()
    return ways, fall, sum(ran)


def divergence(whole, cut, ids):
    """The sum over tokens of KL(whole ‖ cut), by its definition."""
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits.log_softmax(-1)
    found = cut(input_ids=ids).logits.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum()


def slow_twin(model, batches):
    """Inputs and slopes of every writer of the layers that are left, text by text, in float64."""
    whole, cut = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    for index in reversed(range(2, 4)):
        del cut.model.layers[index]
    for index, layer in enumerate(cut.model.layers):
        layer.self_attn.layer_idx = index
    cut.config.num_hidden_layers = 4
    sums = {}
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            taken = {}
            hooks = []
            for layer, module in zip(LAYERS, cut.model.layers[1:], strict=True):
                for name in ("self_attn.o_proj", "mlp.down_proj"):

                    def keep(_module, args, output, key=(layer, name), taken=taken):
                        output.retain_grad()
                        taken[key] = args[0], output

                    hooks.append(module.get_submodule(name).register_forward_hook(keep))
            divergence(whole, cut, torch.from_numpy(ids[mask.astype(bool)])[None]).backward()
            for key, (inputs, output) in taken.items():
                a, g = (v[0, 1:].numpy() for v in (inputs.detach(), output.grad))
                sums.setdefault(key, []).append((a, g))
            for hook in hooks:
                hook.remove()
    return {key: [np.concatenate(v) for v in zip(*rows, strict=True)] for key, rows in sums.items()}


def test_the_ways_are_those_of_the_slow_twin(model, words, tmp_path):
    batches = batches_of(words, TEXTS + sentences(8))
    ways, fall, ran = find(copy.deepcopy(model), batches, tmp_path)
    twin = slow_twin(model, batches)
    assert {(way.layer, way.writer.name) for way in ways} == set(twin)
    falls, size = 0.0, None
    for way in ways:
        a, g = twin[way.layer, way.writer.name]
        gram, cross = a.T @ a, -a.T @ g
        ridge = RIDGE * np.diag(gram).mean()
        step = np.linalg.solve(gram + ridge * np.eye(len(gram)), cross).T
        falls += (step * cross.T).sum()
        size = size or float(np.abs(way.step.numpy()).max() / np.abs(step).max())
        np.testing.assert_allclose(
            way.step.numpy() / size, step, rtol=1e-2, atol=2e-3 * np.abs(step).max()
        )
    tokens = sum(batch.attention_mask.sum() for batch in batches)
    assert fall / size == pytest.approx(falls / tokens, rel=1e-2)
    assert ran == len(batches) * (3 + 1 + 3)  # up, the head, and down


def test_a_small_step_falls_as_is_said(model, words, tmp_path):
    """By a hundredth of the divergence; first tokens, which no step was fitted on, fall with it."""
    model = copy.deepcopy(model)
    batches = batches_of(words, sentences(32, seed=7))
    ways, fall, _ = find(model, batches, tmp_path)
    layerwise = Layerwise(model)
    ids = torch.from_numpy(np.concatenate([batch.input_ids for batch in batches]))
    whole = copy.deepcopy(model)

    def mean():
        found = 0.0
        for batch in batches:
            states = layerwise.run(batch, layerwise.embed(batch), (0, *LAYERS))
            with layerwise.starting_from(states, ()), torch.no_grad():
                logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits.double()
                wanted = whole(input_ids=torch.from_numpy(batch.input_ids)).logits.double()
            kl = wanted.softmax(-1) * (wanted.log_softmax(-1) - logits.log_softmax(-1))
            found += float(kl.sum())
        return found / ids.numel()

    before, step = mean(), 1e-5 / fall
    with torch.no_grad():
        for way in ways:
            way.writer.module.weight += step * way.step
    assert before - mean() == pytest.approx(1e-5, rel=0.2)


def test_slopes_of_the_divergence_are_those_of_autograd(model, words, monkeypatch):
    monkeypatch.setattr(descent, "COPIES", 1 << 18)  # so that rows are taken in parts
    generator = torch.Generator().manual_seed(0)
    cut, whole = (torch.randn(13, 32, generator=generator) for _ in range(2))
    head = Layerwise(model).head
    given = cut.clone().requires_grad_()
    wanted = model.lm_head(whole).detach().log_softmax(-1)
    found = model.lm_head(given).log_softmax(-1)
    (expected,) = torch.autograd.grad((wanted.exp() * (wanted - found)).sum(), given)
    torch.testing.assert_close(divergence_slopes(head, cut, whole), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("least", [0.0, 0.03, 0.2, 0.45, 1.0, 3.7, 1e9])
def test_a_walk_ends_at_the_least_loss_that_was_found(least):
    module = torch.nn.Linear(3, 2)
    weight = module.weight.detach().clone()
    way = Way(0, Writer("down", module, 1.0), torch.ones(2, 3))
    tried = []

    def loss():
        step = float((module.weight.detach() - weight).mean())
        tried.append((abs(step - least), step))
        return abs(step - least)

    with torch.no_grad():
        found = walk([way], 0.4, changes=Changes(), loss=loss, nats=least)
    best = min([*tried, (least, 0.0)])
    assert found == pytest.approx(best[0])
    assert float((module.weight - weight).detach().mean()) == pytest.approx(best[1], abs=1e-6)
    assert len(tried) <= descent.TRIES + 1
    if 0.1 < least < 2:
        assert found < 0.5 * least


@pytest.mark.parametrize("first", [0.0, -1.0, np.inf, np.nan])
def test_there_is_no_walk_without_a_way_down(first):
    with torch.no_grad():
        assert walk([], first, changes=Changes(), loss=lambda: 0.0, nats=2.0) == 2.0


@pytest.mark.parametrize(("count", "tokens"), [(1, 9), (2, 9), (7, 4000), (40, 4000)])
def test_batches_are_shared_out_to_rounds(words, count, tokens):
    class Whole:
        attention_mask = np.ones((1, tokens))

    found = rounds([Whole()] * count)
    flat = [index for part in found for index in part]
    assert len(set(flat)) == len(flat)
    assert all(part for part in found)
    assert len(found) == min(count, descent.ROUNDS)
    assert all(len(part) * tokens <= descent.ROUND_TOKENS for part in found)
    assert max(flat) >= count - 2 * count // len(flat) - descent.ROUNDS


def test_a_feed_forward_that_runs_on_all_tokens_as_rows_goes_down_as_well(words, tmp_path):
    """That of OPT, which flattens texts and tokens."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "vocab_size": 100}
    config = OPTConfig(
        **sizes, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64
    )
    layerwise = Layerwise(OPTForCausalLM(config).eval())
    batches = batches_of(words, TEXTS[:8])
    states = [Stored(None, batches, 32, torch.float32) for _ in range(2)]
    for index, batch in enumerate(batches):
        states[1][index] = layerwise.embed(batch)
        states[0][index] = layerwise.run(batch, states[1][index], range(4))
    with torch.no_grad():
        ways, fall = Descent(
            layerwise, (0, 2, 3), states=StateSet(batches, *states), folder=tmp_path,
            ran=lambda _: None,
        ).find()  # fmt: skip
    assert {way.layer for way in ways} == {0, 2, 3}
    assert fall > 0
