"""Weights that wait for their forward, read and changed where they are stored."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from torch._subclasses.fake_tensor import FakeTensorMode

from shallower.models.layerwise import Layerwise
from shallower.models.offload import (
    execution_device,
    is_offloaded,
    resident,
    stored_weight,
    write_weight,
)
from tests.conftest import tiny_llama
from tests.models.batches import batch
from tests.models.offloaded import offloaded


def test_a_weight_is_found_where_it_is_stored():
    plain, model = tiny_llama(), offloaded(tiny_llama())
    module, twin = model.model.layers[2].mlp.down_proj, plain.model.layers[2].mlp.down_proj
    assert module.weight.is_meta
    assert torch.equal(stored_weight(module, "weight"), twin.weight)
    assert stored_weight(twin, "weight") is twin.weight
    assert execution_device(module) == torch.device("cpu")
    assert execution_device(twin) is None


@pytest.mark.parametrize("layers", [None, [2]])
@pytest.mark.parametrize("held", [True, False])
def test_a_change_is_seen_by_every_forward(layers, held):
    plain, model = tiny_llama(), offloaded(tiny_llama(), layers)
    value = torch.randn(32, 48, dtype=torch.float64)
    with torch.no_grad():
        write_weight(plain.model.layers[2].mlp.down_proj, "weight", value)
        layer = model.model.layers[2]
        if held:
            with resident(layer):
                module = layer.mlp.down_proj
                module.weight = torch.nn.Parameter(module.weight.clone())  # as a GPU has it
                write_weight(module, "weight", value)
                assert torch.equal(layer.mlp.down_proj.weight, value.float())
        else:
            write_weight(layer.mlp.down_proj, "weight", value)
        ids = torch.arange(9)[None]
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_resident_weights_are_brought_once_and_taken_away_again():
    layer = offloaded(tiny_llama(), [2]).model.layers[2]
    module = layer.mlp.down_proj
    assert is_offloaded(layer)
    with resident(layer):
        weight = module.weight
        assert not is_offloaded(layer)
        with resident(layer):
            module(torch.zeros(1, 48))
        assert module.weight is weight
    assert module.weight.is_meta
    assert is_offloaded(layer)


def test_resident_weights_are_taken_away_after_an_error():
    layer = offloaded(tiny_llama(), [2]).model.layers[2]
    with pytest.raises(ZeroDivisionError), resident(layer):
        raise ZeroDivisionError
    assert layer.mlp.down_proj.weight.is_meta
    assert is_offloaded(layer)


def test_passes_take_offloaded_layers_one_by_one():
    assert list(Layerwise(tiny_llama()).passes((1, 2, 4))) == [(1, 2, 4)]
    layerwise, some = Layerwise(offloaded(tiny_llama(), [2])), batch()
    assert list(layerwise.passes((0, 1))) == [(0, 1)]
    states = expected = layerwise.embed(some)
    for layers in layerwise.passes((1, 2, 4)):
        assert len(layers) == 1
        states = layerwise.run(some, states, layers)
    assert torch.equal(states, layerwise.run(some, expected, (1, 2, 4)))


def test_a_weight_is_changed_on_both_devices():
    with FakeTensorMode(), torch.no_grad():
        module = torch.nn.Linear(3, 2, device="cuda", dtype=torch.bfloat16)
        store = {"weight": torch.zeros(2, 3, dtype=torch.bfloat16)}
        module._hf_hook = AlignDevicesHook("cuda", weights_map=store)
        write_weight(module, "weight", torch.ones(2, 3, device="cuda", dtype=torch.float64))
        assert module.weight.is_cuda
        assert stored_weight(module, "weight").device == torch.device("cpu")
