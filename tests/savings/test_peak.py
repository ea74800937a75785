"""The memory of a loss at a large vocabulary."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shallower.evaluation.loss import measure_loss
from shallower.healing.losses import TrainingLoss
from shallower.healing.training import add_adapters
from shallower.models.decoder import Decoder
from shallower.models.feed_forward import feed_forward_targets
from shallower.settings.recipe import Recipe
from shallower.values.tokens import Tokens
from tests.conftest import WORDS, word_tokenizer
from tests.healing.cuts import FACTS
from tests.peaks import needs_linux, peak_of

VOCABULARY = 262_144


def wide_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def measuring(texts, length):
    """A held-out loss of texts that are a little shorter each."""
    decoder, tokenizer = Decoder.of(wide_model()), word_tokenizer()
    words = [" ".join(WORDS[i % 97] for i in range(length - 2 * k)) for k in range(texts)]
    tokens = Tokens(length, texts)
    return lambda: measure_loss(decoder, tokenizer, words, tokens=tokens, progress=False).nats


def training(texts, length):
    """The loss of a step and its gradient."""
    recipe = Recipe(rank=4, dtype="float32", dropout=0.0).resolve(FACTS)
    whole = wide_model()
    adapted = add_adapters(whole, feed_forward_targets(whole), recipe, base="base").train()
    loss_of = TrainingLoss(whole)
    ids = torch.randint(0, VOCABULARY, (texts, length))

    def step():
        with loss_of.made_inside(ids, ids.numel() - texts):
            outputs = adapted(input_ids=ids, use_cache=False)
        loss = TrainingLoss.of(outputs, ids, ids.numel() - texts)
        loss.backward()
        return loss.item()

    return step


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("prepare", [measuring, training])
@pytest.mark.parametrize(
    ("texts", "length", "most"),
    [
        (2, 288, 500e6),  # of 604 MB of logits, in float32
        (8, 4096, 1e9),  # of 34 GB
    ],
)
def test_the_memory_of_a_loss_does_not_grow_with_the_tokens(prepare, texts, length, most):
    losses, work = [], prepare(texts, length)
    above = peak_of(lambda: losses.append(work()))
    assert 12 < losses[0] < 13.5  # of random weights: ln(vocabulary) and a little
    assert above < most < texts * length * VOCABULARY * 4
