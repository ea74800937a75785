"""Losses of models on fake CUDA devices, and how they speak."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import shallower as sh
from shallower.evaluation.answers import write_answers
from shallower.evaluation.loss import evaluate_loss
from shallower.evaluation.speech import Reference, Speaking, evaluate_speech
from shallower.models.decoder import Decoder
from shallower.texts.prompts import Prompt, prompt_ids
from tests.conftest import word_tokenizer
from tests.devices.batches import TEXTS

WORDS = word_tokenizer()
PROMPTS = ["w3 w4", "w5 w6 w7"]
OPTIONS = {"num_tokens": 2, "batch_size": 4, "progress": False}


def test_the_loss(stage):
    with stage.open():
        loss = evaluate_loss(stage.model(), WORDS, TEXTS, batch_size=3, progress=False)
    assert loss.num_tokens == sum(len(text.split()) - 1 for text in TEXTS)
    assert loss.vocab_size == 32000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 0])
def test_prompts_are_answered(stage, seed):
    prompts = prompt_ids(WORDS, [Prompt(one) for one in PROMPTS])
    with stage.open():
        found = write_answers(Decoder.of(stage.model()), WORDS, prompts, seed=seed, **OPTIONS)
    assert [one.written for one in found] == [(1,), (1,)]  # all that is read is true, as an end


@pytest.mark.slow
def test_a_model_speaks_beside_one_on_the_cpu(stage):
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    with stage.open():
        whole = LlamaForCausalLM(config).eval()
        found = evaluate_speech(stage.model(), WORDS, PROMPTS[:1], whole=whole, **OPTIONS)
    assert found.num_prompts == 1


def test_a_cut_speaks_in_the_place_of_the_whole_model(stage):
    prompts = prompt_ids(WORDS, [Prompt(one) for one in PROMPTS])
    with stage.open():
        model = stage.model()
        reference = Reference.of(Speaking(WORDS, prompts, **OPTIONS), Decoder.of(model))
        with sh.without_layers(model, [1]):
            spoken = reference.compare(Decoder.of(model))
        assert reference.judged(spoken, Decoder.of(model)).num_prompts == 2
