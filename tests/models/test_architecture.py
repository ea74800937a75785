"""The decoder's layers are found by structure, once for a model that is known."""

import pytest
import torch
from torch import nn
from transformers import (
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)

import shallower as sh
from shallower.evaluation.loss import evaluate_loss, measure_loss
from shallower.models import architecture, decoder
from shallower.models.architecture import find_layers, input_device, text_config
from shallower.models.decoder import Decoder
from shallower.models.identity import identify
from shallower.models.layerwise import Layerwise
from shallower.scanning.hidden_states import stream
from shallower.texts.batches import TokenBatches
from shallower.values.tokens import Tokens
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


TEXTS = ["w1 w2 w3", "w4 w5"]


def test_a_decoder_knows_its_model(llama):
    found = Decoder.of(llama)
    assert found.model is llama
    assert found.layers.modules is llama.model.layers
    assert found.config is llama.config
    assert (found.device, found.positions, len(found)) == (torch.device("cpu"), None, 6)
    assert found.identity == identify(llama)
    assert Decoder.of(found) is found


def test_a_decoder_sees_layers_that_are_dropped(llama):
    found = Decoder.of(llama)
    before = found.identity
    with sh.without_layers(llama, [1, 2]):
        assert len(found) == 4
    sh.drop_layers(llama, [5])
    assert len(found) == 5
    assert found.identity == before
    assert Decoder.of(llama).identity != before


def test_a_known_model_is_not_looked_into_again(llama, words, monkeypatch):
    found = Decoder.of(llama)
    expected = evaluate_loss(llama, words, TEXTS)
    states = [part.states for part in stream(llama, TokenBatches(words, TEXTS, Tokens()))]

    def never(*_arguments):
        pytest.fail("the model was looked into again")

    for module in (architecture, decoder):
        monkeypatch.setattr(module, "find_layers", never)
    assert measure_loss(found, words, TEXTS, tokens=Tokens()) == expected
    assert evaluate_loss(found, words, TEXTS) == expected
    again = [part.states for part in stream(found, TokenBatches(words, TEXTS, Tokens()))]
    assert all(torch.equal(one, other) for one, other in zip(states, again, strict=True))
    assert len(Layerwise(found)) == 6
