"""A model is looked into once, and what was found is handed on."""

import pytest
import torch

import shallower as sh
from shallower.evaluation.loss import evaluate_loss, measure_loss
from shallower.models import architecture, decoder
from shallower.models.decoder import Decoder
from shallower.models.identity import identify
from shallower.models.layerwise import Layerwise
from shallower.scanning.hidden_states import stream
from shallower.texts.batches import TokenBatches
from shallower.values.tokens import Tokens

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
