"""Layers run by themselves, against the whole forward; and the maps that write into the stream."""

import pytest
import torch

import shallower as sh
from shallower.models.layerwise import Layerwise
from shallower.models.residual_writers import find_writers
from tests.conftest import mostly_slow, tiny_llama
from tests.families import FAST, random_model
from tests.models.batches import batch

STREAMS = {"dory", "gemma3n_text", "gemma4_text, shared keys and values"}
"""Families in which more than the residual stream goes from layer to layer."""


def logits(model, some):
    with torch.inference_mode():
        return model(
            input_ids=torch.from_numpy(some.input_ids),
            attention_mask=torch.from_numpy(some.attention_mask),
            use_cache=False,
        ).logits


def rest(layerwise, model, some, *, states, layers):
    """The logits of a model whose forward starts from states."""
    with layerwise.starting_from(states, layers):
        return logits(model, some)


def test_a_model_of_nan_is_not_taken_for_one_of_several_streams():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0] = torch.nan
    Layerwise(model).check(batch())


def test_layers_that_are_not_run_pass_on_what_they_get():
    model, some = tiny_llama(), batch()
    layerwise = Layerwise(model)
    states = layerwise.embed(some)
    found = rest(layerwise, model, some, states=states, layers=(0, 1, 4, 5))
    with sh.without_layers(model, [range(2, 4)]):
        assert torch.equal(found, logits(model, some))


def test_the_model_is_as_it_was_afterwards():
    model, some = tiny_llama().train(), batch()
    layerwise = Layerwise(model)
    layerwise.run(some, layerwise.embed(some), (2,))
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", mostly_slow(FAST, FAST[::2]))
def test_a_family_can_be_run_by_layers_or_is_refused(name):
    model, some = random_model(name), batch(vocabulary=60)
    layerwise = Layerwise(model)
    if name in STREAMS:
        with pytest.raises(sh.ModelError, match="more than the residual stream"):
            layerwise.check(some)
        return
    layerwise.check(some)
    states = layerwise.run(some, layerwise.embed(some), range(len(layerwise)))
    mask = some.attention_mask.astype(bool)
    found = rest(layerwise, model, some, states=states, layers=())
    expected = logits(model, some)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-6)


NAMES = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "granite": ("self_attn.o_proj", "mlp.down_proj"),
}
REFUSED = {"gemma2": "a norm behind the feed-forward", "mixtral": "experts"}


def writers(model, layer=3):
    layerwise, some = Layerwise(model), batch(vocabulary=60)
    states = layerwise.run(some, layerwise.embed(some), range(layer))
    return find_writers(layerwise, layer, batch=some, states=states)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_last_matrices_of_attention_and_feed_forward(name):
    found = writers(random_model(name))
    assert (found.attention.name, found.feed_forward.name) == NAMES[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_feed_forward_that_is_no_plain_sum_has_none(name):
    assert writers(random_model(name)).feed_forward is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_multiplier_behind_a_writer_is_its_scale(dtype):
    model = random_model("granite").to(dtype)
    for layer in model.model.layers:
        layer.residual_multiplier = 0.25
    found = writers(model)
    assert found.feed_forward.scale == pytest.approx(0.25, rel=0.01)
    assert found.attention.scale == pytest.approx(0.25, rel=0.01)


def test_massive_channels_do_not_hide_a_writer():
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 2000
    found = writers(model.bfloat16())
    assert (found.attention.name, found.feed_forward.name) == NAMES["llama"]


def test_a_weight_is_seen_as_outputs_by_inputs():
    gpt2 = writers(random_model("gpt2")).feed_forward
    assert gpt2.weight.shape == gpt2.module.weight.shape[::-1]
    llama = writers(tiny_llama()).feed_forward
    assert llama.weight.shape == llama.module.weight.shape == (32, 48)


@pytest.mark.parametrize("name", FAST)
def test_what_is_found_in_a_family_does_write(name):
    """Adding to the feed-forward's weight moves the layer's output by that, times the scale."""
    model, some = random_model(name), batch(vocabulary=60)
    layerwise = Layerwise(model)
    states = layerwise.run(some, layerwise.embed(some), range(3))
    writer = find_writers(layerwise, 3, batch=some, states=states).feed_forward
    if writer is None:
        return
    taken = []
    hook = writer.module.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    before = layerwise.run(some, states, (3,))
    hook.remove()
    delta = 0.1 * torch.randn(writer.weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        writer.weight.add_(delta)
    after = layerwise.run(some, states, (3,))
    mask = some.attention_mask.astype(bool)
    expected = before + writer.scale * (taken[0] @ delta.T).view_as(before)
    torch.testing.assert_close(after[mask], expected[mask], rtol=1e-3, atol=1e-3)
