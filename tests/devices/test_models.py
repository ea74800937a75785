"""Whatever knows a model or runs its layers, on fake CUDA devices."""

import numpy as np
import pytest
import torch

from shallower.evaluation.loss import summed_losses
from shallower.models.decoder import Decoder
from shallower.models.head import Head
from shallower.models.identity import weights_hash
from shallower.models.layerwise import Layerwise
from shallower.models.residual_writers import find_writers
from tests.conftest import mostly_slow
from tests.devices.batches import batch, inputs
from tests.devices.stage import WIDTH

A_PLAIN_SUM = (1.0, 0.0)
"""Read in turn: the factor of a writer, and the deviation from it."""


def test_a_model_is_known_by_its_values_wherever_they_are(stage):
    decoder = Decoder.of(stage.model())
    assert decoder.device == torch.device("cuda:0")
    with stage.open():
        assert decoder.identity.dtype == "bfloat16"


def test_the_weights_of_a_model_are_hashed_wherever_they_are(stage):
    with stage.open():
        model = stage.model()
        offloaded = any(weight.is_meta for weight in model.parameters())
        assert (weights_hash(model) is None) == offloaded


@pytest.mark.parametrize(
    "apart", mostly_slow([False, True], [True]), ids=["as they come", "after a stop on the CPU"]
)
def test_layers_run_one_by_one(stage, apart):
    with stage.open():
        model = Layerwise(stage.model())
        states = model.embed(batch())
        for layer in range(4):
            states = model.run(batch(), states.cpu() if apart else states, (layer,))
        last = stage.last
        assert states.device == last
        with model.starting_from(states.cpu() if apart else states, (2, 3)):
            assert summed_losses(model.head, batch()).shape == (3,)


def test_the_layers_are_checked_against_the_whole_model(stage):
    with stage.open():
        Layerwise(stage.model()).check(batch())


def test_the_head_makes_logits_of_a_few_rows(stage):
    with stage.open():
        head = Head.of(Decoder.of(stage.model()))
        assert head.by_rows
        assert head.logits(torch.empty(5, WIDTH, device=stage.last)).shape == (5, 32000)


@pytest.mark.parametrize(
    "by_rows", mostly_slow([True, False], [False]), ids=["by rows", "as a whole"]
)
def test_the_logits_of_chosen_tokens(stage, by_rows):
    with stage.open():
        head = Head.of(Decoder.of(stage.model()))
        given = inputs("cuda:0")
        words = given["input_ids"], given["attention_mask"]
        head = head if by_rows else head.whole()
        for tokens in (np.arange(3), np.arange(20)):
            (part,) = head.logits_of(*words, tokens)
            assert part.shape == (len(tokens), 32000)


@pytest.mark.parametrize("layer", mostly_slow([0, 3], [3]))
def test_writers_are_found(stage, layer):
    with stage.open(_scale=A_PLAIN_SUM):
        model = Layerwise(stage.model())
        states = model.embed(batch())
        found = find_writers(model, layer, batch=batch(), states=states)
        assert (found.attention.name, found.feed_forward.name) == (
            "self_attn.o_proj",
            "mlp.down_proj",
        )
