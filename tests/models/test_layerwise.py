"""Layers run by themselves, against the whole forward."""

import pytest
import torch

import shallower as sh
from shallower.models.layerwise import Layerwise
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
