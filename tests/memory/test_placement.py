"""A model divided between one GPU and the memory of the CPU."""

import pytest
import torch
from accelerate.utils import check_device_map

import shallower as sh
from shallower.memory.placement import map_within
from tests.conftest import tiny_llama
from tests.families import FAST, random_model


def sizes(model, itemsize=2):
    layer = itemsize * sum(p.numel() for p in model.model.layers[0].parameters())
    return itemsize * sum(p.numel() for p in model.parameters()), layer


def test_what_fits_stays_on_the_device():
    model = tiny_llama()
    whole, _ = sizes(model)
    assert map_within(model, whole, dtype=torch.bfloat16) == {"": 0}
    assert map_within(model, whole, dtype=torch.float32) != {"": 0}


def test_layers_that_are_spared_wait_first_and_one_of_them_finds_room():
    model = tiny_llama()
    whole, layer = sizes(model)
    options = {"dtype": torch.bfloat16, "device": "cuda:1", "spare": (3, 0)}
    waiting = {
        budget: [
            name
            for name, place in map_within(model, whole - budget * layer, **options).items()
            if place == "cpu"
        ]
        for budget in (1, 2, 4)
    }
    assert waiting[1] == ["model.layers.0", "model.layers.3"]
    assert waiting[2] == ["model.layers.0", "model.layers.3", "model.layers.5"]
    assert len(waiting[4]) == 5
    places = map_within(model, whole - layer, **options)
    assert places["model.embed_tokens"] == places["lm_head"] == "cuda:1"


def test_a_device_without_room_for_one_layer_is_refused():
    model = tiny_llama()
    whole, layer = sizes(model)
    map_within(model, whole - 5 * layer, dtype=torch.bfloat16)
    with pytest.raises(sh.ModelError, match="LlamaForCausalLM needs"):
        map_within(model, whole - 5 * layer - 1, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", FAST)
def test_every_weight_of_a_family_has_a_place(name):
    model = random_model(name).to("meta")
    whole = sum(p.numel() for p in model.parameters())
    check_device_map(model, map_within(model, int(2 * 0.9 * whole), dtype=torch.bfloat16))
