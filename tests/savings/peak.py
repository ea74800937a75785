"""The memory of a loss at a large vocabulary: `peak.py WHAT TEXTS LENGTH VOCABULARY`, as JSON.

WHAT is `measure`, of a held-out loss, or `train`, of a step's loss and gradient."""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shallower.evaluation.loss import measure_loss
from shallower.healing.losses import TrainingLoss
from shallower.healing.training import add_adapters
from shallower.models.decoder import Decoder
from shallower.models.feed_forward import feed_forward_targets
from shallower.values.recipe import Recipe
from shallower.values.tokens import Tokens
from tests.conftest import WORDS, word_tokenizer
from tests.healing.cuts import FACTS

STATUS = Path("/proc/self/status")


def resident(name):
    """Bytes of this process in memory, now (`VmRSS`) or at most (`VmHWM`)."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def model(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def measuring(texts, length, vocabulary):
    """A held-out loss of texts that are a little shorter each."""
    decoder, tokenizer = Decoder.of(model(vocabulary)), word_tokenizer()
    words = [" ".join(WORDS[i % 97] for i in range(length - 2 * k)) for k in range(texts)]
    tokens = Tokens(length, texts)
    return lambda: measure_loss(decoder, tokenizer, words, tokens=tokens, progress=False).nats


def training(texts, length, vocabulary):
    """The loss of a step and its gradient."""
    recipe = Recipe(rank=4, dtype="float32", dropout=0.0).resolve(FACTS)
    whole = model(vocabulary)
    adapted = add_adapters(whole, feed_forward_targets(whole), recipe, base="base").train()
    loss_of = TrainingLoss(whole)
    ids = torch.randint(0, vocabulary, (texts, length))

    def step():
        with loss_of.made_inside(ids, ids.numel() - texts):
            outputs = adapted(input_ids=ids, use_cache=False)
        loss = TrainingLoss.of(outputs, ids, ids.numel() - texts)
        loss.backward()
        return loss.item()

    return step


if __name__ == "__main__":
    what, *sizes = sys.argv[1:]
    work = {"measure": measuring, "train": training}[what](*map(int, sizes))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started = resident("VmRSS"), time.perf_counter()
    loss = work()
    seconds = time.perf_counter() - started
    print(json.dumps({"above": resident("VmHWM") - before, "loss": loss, "seconds": seconds}))
