"""Layers dropped from a model that lies on fake CUDA devices."""

import pytest
import torch
from torch import nn

from shallower.cutting import saving
from shallower.cutting.in_model import drop_layers, without_layers
from shallower.models.architecture import PackedTable
from shallower.values.experts import DroppedExperts
from shallower.values.plan import Plan
from tests.devices.batches import inputs
from tests.devices.conftest import on_devices
from tests.devices.stage import Stage
from tests.devices.test_scanning import MIXTRAL


def map_of_half(stage):
    """Where the layers 0 and 3 of four are; None where all are on one device."""
    if stage.devices == 1 and not stage.offloading:
        return None
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0"], 0)
    return places | dict.fromkeys(["model.layers.1", "model.norm", "lm_head"], stage.last.index)


def runs(model):
    ids = inputs("cuda:0")["input_ids"]
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.shape == (3, 9, 32000)


def test_a_model_without_some_layers_runs(stage):
    model = stage.model()
    before = getattr(model, "hf_device_map", None)
    with stage.open():
        with without_layers(model, [1, 2]):
            assert runs(model)
            assert getattr(model, "hf_device_map", None) == map_of_half(stage)
        assert runs(model)
    assert getattr(model, "hf_device_map", None) == before


def test_a_model_that_lost_layers_runs(stage):
    model = stage.llama()
    with stage.open():
        drop_layers(model, [1, 2])
        assert len(model.model.layers) == 2
        assert runs(model)
    assert getattr(model, "hf_device_map", None) == map_of_half(stage)


@on_devices
def test_a_mixture_without_some_experts_runs(stage):
    model = stage.mixture(MIXTRAL)
    plan = Plan(4, (), experts=DroppedExperts(4, dict.fromkeys(range(4), (0, 2))))
    with stage.open(), without_layers(model, plan):
        assert {len(layer.mlp.gate.weight) for layer in model.model.layers} == {2}
        model(input_ids=inputs("cuda:0")["input_ids"], use_cache=False)


def test_a_weight_that_holds_a_part_for_every_layer_is_cut(stage):
    with stage.open():
        model = nn.Module()
        model.table = nn.Embedding(100, 4 * 16, device=stage.last)
        table = PackedTable(model, "table.weight", 1, 4)
        table.keep([0, 3])
        assert (model.table.weight.shape, model.table.weight.device) == ((100, 32), stage.last)
        table.restore()
        assert model.table.weight.shape == (100, 64)


@pytest.mark.skipif(torch.__version__ < "2.15", reason="torch.empty_like of meta in a fake mode")
def test_a_saved_cut_is_compared_with_its_model(stage):
    saved = Stage(0).llama(2)
    with stage.open(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "load_weights", lambda *_, **__: saved)
        ids = inputs("cpu")["input_ids"]
        assert saving.logits_difference(stage.model(), "cut", [1, 2], input_ids=ids) > 0
