"""The way down from a cut, against steps of a slow twin in float64."""

import copy
import math

import numpy as np
import pytest
import torch

from shallower.memory.budget import BUDGET
from shallower.models.layerwise import Layerwise
from shallower.patching import descent
from shallower.patching.checkpoint import Changes
from shallower.patching.descent import (
    Descent,
    MovingMatrix,
    draw_steps,
    keep_best,
    matrices,
    target_gradients,
)
from shallower.patching.states import Spool
from shallower.texts.batches import TokenBatches
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow
from tests.documents import TEXTS
from tests.examples import sentences

LAYERS = (1, 4, 5)
"""Layers that are left of six, from the first that moves on; 2 and 3 are gone."""


@pytest.fixture(scope="module")
def model(learned_six):
    """A tiny Llama that has learned something. Tests leave it as it is."""
    return learned_six


def batches_of(words, texts, batch_size=4):
    return list(TokenBatches(words, texts, Tokens(32, batch_size), min_tokens=2))


def states_of(layerwise, batches, first=LAYERS[0]):
    """The states before a layer, and the whole model's last ones."""
    sample = layerwise.embed(batches[0])
    last, start = (Spool(batches, sample.shape[-1], sample.dtype, on_disk=False) for _ in range(2))
    for index, batch in enumerate(batches):
        start[index] = layerwise.run(batch, layerwise.embed(batch), range(first))
        last[index] = layerwise.run(batch, start[index], range(first, len(layerwise)))
    return {"whole": last, "cut": start}


def gone(model, batches, layers=LAYERS):
    """A descent of a model, after all of its steps, and their number."""
    layerwise, steps = Layerwise(model), []
    with torch.no_grad():
        states = states_of(layerwise, batches, layers[0])
        down = Descent(layerwise, layers, **states, changes=Changes())
        down.run(steps.append)
    return down, sum(steps)


def cut_of(model):
    cut = copy.deepcopy(model)
    for index in reversed(range(2, 4)):
        del cut.model.layers[index]
    for index, layer in enumerate(cut.model.layers):
        layer.self_attn.layer_idx = index
    cut.config.num_hidden_layers = 4
    return cut


def missed(whole, cut, ids, share):
    """The sum over tokens of the cross-entropy with the target, by its definition."""
    with torch.no_grad():
        target = whole(input_ids=ids).logits.softmax(-1)
        labels = torch.nn.functional.one_hot(ids[:, 1:], target.shape[-1])
        target[:, :-1] += share * (labels - target[:, :-1])
    return -(target * cut(input_ids=ids).logits.log_softmax(-1)).sum()


def slow_twin(model, batches, steps):
    """The weights of the cut after some steps, text by text and entry by entry, in float64."""
    whole = copy.deepcopy(model).double()
    cut = cut_of(whole)
    weights = {
        f"{layer}.{name}": weight
        for layer, module in zip(LAYERS, cut.model.layers[1:], strict=True)
        for name, weight in module.named_parameters() if weight.ndim > 1
    }  # fmt: skip
    sizes = {k: float(w.detach().square().mean().sqrt()) for k, w in weights.items()}
    momentum, rows, columns = (dict.fromkeys(weights, 0.0) for _ in range(3))
    share = descent.LABELS * 2 * len(steps) / descent.STEPS
    for number, chosen in enumerate(steps, 1):
        total = sum(
            missed(whole, cut, torch.from_numpy(ids[mask.astype(bool)])[None], share)
            for batch in (batches[index] for index in chosen)
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        )
        slopes = torch.autograd.grad(total, list(weights.values()))
        rate = descent.RATE * min(
            number / descent.WARM_UP, (len(steps) - number + 1) / (descent.DECAY * len(steps)), 1
        )
        for (key, weight), slope in zip(weights.items(), slopes, strict=True):
            g = slope.numpy()
            momentum[key] = 0.9 * momentum[key] + 0.1 * g
            rows[key] = 0.99 * rows[key] + 0.01 * (g**2).mean(1)
            columns[key] = 0.99 * columns[key] + 0.01 * (g**2).mean(0)
            square = np.outer(rows[key], columns[key]) / rows[key].mean() / (1 - 0.99**number)
            turn = momentum[key] / (1 - 0.9**number) / np.sqrt(square)
            step = rate * sizes[key] * np.clip(turn, -descent.MOST, descent.MOST)
            weight.data -= torch.from_numpy(step)
    return {key: weight.detach().numpy() for key, weight in weights.items()}


@pytest.mark.parametrize("frozen", mostly_slow([False, True], [True]))
def test_the_steps_are_those_of_the_slow_twin(model, words, monkeypatch, frozen):
    monkeypatch.setattr(descent, "STEP_TOKENS", 200)
    monkeypatch.setattr(descent, "STEPS", 12)
    batches = batches_of(words, TEXTS + sentences(8))
    once = draw_steps(batches)
    assert any(len(chosen) > 1 for chosen in once)
    assert 4 * len(once) < descent.STEPS  # so that less than the whole share are labels
    twin = slow_twin(model, batches, 2 * once)
    moved = copy.deepcopy(model).requires_grad_(not frozen)
    _, steps = gone(moved, batches)
    assert steps == descent.num_steps(batches) == len(2 * once)
    for key, expected in twin.items():
        layer, _, name = key.partition(".")
        before = model.model.layers[int(layer)].get_parameter(name).detach().numpy()
        after = moved.model.layers[int(layer)].get_parameter(name)
        assert after.requires_grad is not frozen
        way = np.abs(expected - before).max()
        np.testing.assert_allclose(after.detach().numpy(), expected, rtol=0, atol=2e-2 * way)
        assert np.abs(after.detach().numpy() - expected).mean() < 1e-3 * way
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or ".2." in name or ".3." in name or "layers" not in name:
            assert torch.equal(weight, moved.get_parameter(name))


@pytest.mark.parametrize(
    "dtype", mostly_slow([torch.float32, torch.bfloat16], quick=[torch.bfloat16])
)
def test_memory_has_no_say_in_where_a_way_ends(model, words, monkeypatch, dtype):
    monkeypatch.setattr(descent, "STEP_TOKENS", 1)
    batches, run, ran = batches_of(words, TEXTS), Layerwise.run, []
    monkeypatch.setattr(Layerwise, "run", lambda *args: ran.append(args) or run(*args))
    layer = descent.graph_bytes(
        model.model.layers[0], max(batch.input_ids.size for batch in batches)
    ) * dtype.itemsize // 4  # fmt: skip
    ways, runs = [], []
    for free in (0, 4 * layer, 4 * len(LAYERS) * layer):
        monkeypatch.setattr(BUDGET, "share", lambda _, room=free // 4: room)
        moved = copy.deepcopy(model).to(dtype)
        ran.clear()
        gone(moved, batches)
        ways.append(moved.state_dict())
        runs.append(len(ran))
    assert runs[0] > runs[1] > runs[2]
    for key, value in ways[0].items():
        assert torch.equal(value, ways[1][key])
        assert torch.equal(value, ways[2][key])


def test_a_way_is_gone_in_part(model, words):
    batches = batches_of(words, TEXTS)
    moved = copy.deepcopy(model)
    down, _ = gone(moved, batches)
    far = [p.detach().clone() for p in moved.parameters()]
    with torch.no_grad():
        down.put(0.5)
        half = [p.detach().clone() for p in moved.parameters()]
        down.put(0.0)
    for start, middle, end, back in zip(
        model.parameters(), half, far, moved.parameters(), strict=True
    ):
        assert torch.equal(start, back)
        torch.testing.assert_close(middle, (start + end).detach() / 2)
    assert any(not torch.equal(start, end) for start, end in zip(half, far, strict=True))


def test_steps_below_the_grain_of_a_dtype_add_up():
    layer = torch.nn.Linear(8, 8).bfloat16()
    start = layer.weight.detach().float().clone()
    moving, changes = MovingMatrix(layer, "weight"), Changes()
    with torch.no_grad():
        for _ in range(20):
            moving.step(torch.ones(8, 8), 0.0005, changes)
    way = (layer.weight.detach().float() - start).mean() / start.square().mean().sqrt()
    assert float(way) == pytest.approx(-0.01, rel=0.1)


def test_experts_without_tokens_stay():
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.experts = torch.nn.Parameter(torch.randn(3, 4, 5))
    (found,) = matrices(layer)
    start, slopes = layer.experts.detach().clone(), torch.randn(3, 4, 5)
    slopes[1] = 0
    moving, changes = MovingMatrix(*found), Changes()
    with torch.no_grad():
        for _ in range(3):
            moving.step(slopes, 0.01, changes)
    assert torch.equal(layer.experts[1], start[1])
    assert bool((layer.experts[0] != start[0]).all())
    assert len(changes) == 1


def test_slopes_that_almost_vanish_do_not_run_away():
    layer = torch.nn.Linear(4, 4)
    start, slopes = layer.weight.detach().clone(), torch.ones(4, 4)
    slopes[0] = 1e-25  # whose squares are none
    with torch.no_grad():
        MovingMatrix(layer, "weight").step(slopes, 0.01, Changes())
    size = float(start.square().mean().sqrt())
    assert float((layer.weight - start).detach().abs().max()) <= 1.01 * 0.01 * descent.MOST * size


def test_slopes_towards_the_target_are_those_of_autograd(model, words, monkeypatch):
    monkeypatch.setattr(descent, "COPIES", 1 << 18)  # so that rows are taken in parts
    generator = torch.Generator().manual_seed(0)
    cut, whole = (torch.randn(13, 32, generator=generator) for _ in range(2))
    head = Layerwise(model).head
    labels = torch.arange(13) * 7
    labels[4::5] = -1
    given = cut.clone().requires_grad_()
    wanted = model.lm_head(whole).detach().softmax(-1)
    found = model.lm_head(given).log_softmax(-1)
    has = labels >= 0
    loss = -(wanted * found).sum(-1)
    loss[has] *= 1 - 0.3
    loss[has] -= 0.3 * found[has, labels[has]]
    (expected,) = torch.autograd.grad(loss.sum(), given)
    torch.testing.assert_close(
        target_gradients(head, cut, whole, labels=labels, share=0.3), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1.0: 1.0, 0.5: 1.5}, (1.0, 1.0)), ({1.0: 1.5, 0.5: 1.2}, (1.2, 0.5)),
        ({1.0: 3.0, 0.5: 2.5}, (2.0, 0.0)), ({1.0: math.inf, 0.5: math.nan}, (2.0, 0.0)),
    ],
)  # fmt: skip
def test_a_way_ends_at_the_least_loss(losses, expected):
    class Way:
        def put(self, share):
            self.share = share

    way = Way()
    assert keep_best(way, lambda: losses[way.share], 2.0) == expected[0]
    assert way.share == expected[1]


@pytest.mark.parametrize(("count", "tokens"), [(1, 9), (2, 9), (7, 4000), (40, 4000), (90, 5000)])
def test_batches_are_drawn_for_steps(count, tokens):
    class Whole:
        attention_mask = np.ones((1, tokens))

    found = draw_steps([Whole()] * count)
    flat = [index for chosen in found for index in chosen]
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(count))
    assert len(found) == min(descent.STEPS, -(-count // max(1, -(-descent.STEP_TOKENS // tokens))))
    assert found == draw_steps([Whole()] * count)
    assert count < 40 or flat != sorted(flat)


def test_a_feed_forward_that_runs_on_all_tokens_as_rows_goes_down_as_well(words):
    """That of OPT, which flattens texts and tokens."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "vocab_size": 100}
    config = OPTConfig(
        **sizes, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64
    )
    model = OPTForCausalLM(config).eval()
    moved = copy.deepcopy(model)
    gone(moved, batches_of(words, TEXTS[:8]), layers=(0, 2, 3))
    changed = {
        name.removeprefix("model.decoder.layers.")
        for name, weight in moved.named_parameters()
        if not torch.equal(weight, model.get_parameter(name))
    }
    assert changed == {
        f"{layer}.{name}.weight"
        for layer in (0, 2, 3)
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
            "fc1", "fc2",
        )
    }  # fmt: skip
