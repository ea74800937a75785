"""Texts longer than learned positions."""

import random

import pytest
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import shallower as sh
from shallower import TextsError
from shallower.models.layerwise import Layerwise
from tests.conftest import WORDS, tiny_llama
from tests.models.batches import batch

# Positions.
SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LEARNED = {
    "gpt2": GPT2LMHeadModel(GPT2Config(**SMALL, n_positions=9)),
    "opt": OPTForCausalLM(
        OPTConfig(**SMALL, max_position_embeddings=9, ffn_dim=48, word_embed_proj_dim=32)
    ),
    "biogpt": BioGptForCausalLM(
        BioGptConfig(**SMALL, max_position_embeddings=9, intermediate_size=48)
    ),
}


@pytest.mark.parametrize("family", LEARNED)
def test_a_text_longer_than_the_learned_positions_is_refused_before_the_forward(words, family):
    model = LEARNED[family].eval()
    longest, longer = ["w1 " * 9, "w2 w3"], ["w1 " * 10, "w2 w3"]
    for measure in (sh.scan, sh.evaluate_loss):
        measure(model, words, longest)
        measure(model, words, longer, max_length=9)
        with pytest.raises(TextsError, match=r"10 tokens, .*9 positions: choose a max_length"):
            measure(model, words, longer)


LONG = " ".join(random.Random(1).choices(WORDS, k=140))
PROMPTS = ["w1 w2", " ".join(["w3"] * 120)]
MEASURES = {
    "scan": lambda model, words: sh.scan(model, words, [LONG]).num_samples == 1,
    "loss": lambda model, words: sh.evaluate_loss(model, words, [LONG]).num_tokens == 139,
    "perplexity": lambda model, words: (
        sh.evaluate_perplexity(model, words, LONG, context=130).num_tokens == 129
    ),
    "answers": lambda model, words: (
        len(sh.answer_prompts(model, words, PROMPTS, num_tokens=9)[1].written) <= 9
    ),
    "layers": lambda model, _: Layerwise(model).embed(batch(length=129)).shape[1] == 129,
}


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_longer_than_a_config_admits_is_measured_and_said(words, name):
    """As of a model that computes its positions, by RoPE."""
    model = tiny_llama()
    assert model.config.max_position_embeddings == 128
    what = "prompt 1 with an answer of 9 tokens" if name == "answers" else "a text"
    with pytest.warns(UserWarning, match=f"^{what} is longer than the 128 tokens that the"):
        assert MEASURES[name](model, words)
    model.config.max_position_embeddings = 140
    assert MEASURES[name](model, words)
