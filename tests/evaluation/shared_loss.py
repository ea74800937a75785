"""One of several processes that measure a loss together."""

import json

import torch
from torch import distributed

import shallower as sh
from shallower.evaluation.loss import gathered, measure_loss
from shallower.models.decoder import Decoder
from shallower.values.tokens import Tokens
from tests.conftest import tiny_llama, word_tokenizer
from tests.evaluation.texts import TEXTS


class UnpicklableError(Exception):
    """An error that cannot be sent to another process."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def fail(error):
    raise error


def outcome(work):
    """What a case gives, or how it fails."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def cases(rank):
    """Every case by its name, as a function without arguments."""
    decoder, words = Decoder.of(tiny_llama(2)), word_tokenizer()
    broken = tiny_llama(2)
    with torch.no_grad():
        broken.model.embed_tokens.weight[96] = torch.nan

    def loss(model, texts, batch_size, shared=True):
        tokens = Tokens(256, batch_size)
        found = measure_loss(model, words, texts, tokens=tokens, shared=shared)
        return found.to_record()

    for batch_size in (1, 3, 50):
        yield f"shared {batch_size}", lambda b=batch_size: loss(decoder, TEXTS, b)
        yield f"alone {batch_size}", lambda b=batch_size: loss(decoder, TEXTS, b, shared=False)
    yield "nothing", lambda: loss(decoder, ["w1"], 2)
    yield "one text", lambda: loss(decoder, ["w1 w2"], 2)
    texts = ["w1 w2 w3 w4", "w2 w3 w96"]  # the second batch is of the second process
    yield "not finite", lambda: loss(Decoder.of(broken), texts, 1)
    for name, error in (
        ("one fails", sh.TextsError("in the first process")),
        ("one fails badly", UnpicklableError("this", "that")),
    ):
        yield name, lambda e=error: gathered(lambda: rank or fail(e), 2)
    yield "all fail", lambda: gathered(lambda: fail(ValueError(str(rank))), 2)
    yield "none fails", lambda: gathered(lambda: rank, 2)


def measure_together(store, rank, size):
    """Print what came of every case, as JSON; ``store`` is the file of a store."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, size), rank=rank, world_size=size
    )
    print(json.dumps({name: outcome(work) for name, work in cases(rank)}))
    distributed.destroy_process_group()
