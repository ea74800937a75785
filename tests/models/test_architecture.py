"""The decoder's layers are found by structure."""

import pytest
import torch
from torch import nn
from transformers import (
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)

import shallower as sh
from shallower.models.architecture import find_layers, input_device, text_config
from tests.conftest import tiny_llama
from tests.models.checkpoints import CAUSAL


# Architecture
def test_a_head_that_is_called_decoder_does_not_mislead():
    config = ModernBertDecoderConfig(**CAUSAL, layer_types=["full_attention"] * 2)
    assert find_layers(ModernBertDecoderForCausalLM(config)).path == "model.layers"


def test_layers_are_found_in_the_base_model_too():
    model = tiny_llama(3).model
    assert find_layers(model).path == "layers"
    assert find_layers(model).owner is model


def test_smaller_lists_of_the_same_length_do_not_mislead(llama):
    llama.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    for layer in llama.model.layers:
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    assert find_layers(llama).path == "model.layers"


def test_the_lists_that_are_there_are_named(llama):
    llama.config.num_hidden_layers = 9
    with pytest.raises(sh.ModelError, match=r"no list of 9 decoder layers.*model\.layers \(6\)"):
        find_layers(llama)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])])
def test_a_module_without_a_config_of_transformers_is_refused(module):
    with pytest.raises(sh.ModelError, match="no transformers config"):
        text_config(module)
    module.config = {"num_hidden_layers": 1}
    with pytest.raises(sh.ModelError, match="no transformers config"):
        find_layers(module)


def test_tokens_go_where_the_first_weights_are(llama):
    assert input_device(find_layers(llama)) == torch.device("cpu")
    assert input_device(find_layers(llama.to("meta"))) == torch.device("cpu")
