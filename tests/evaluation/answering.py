"""Answers token by token, by plain forwards without a cache, in float64."""

import hashlib

import numpy as np
import torch

from shallower.results.speech import Answer


def plain_logits(model, ids):
    """(T, V) float64 logits of one text, alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([[*ids]])).logits[0].numpy().astype(np.float64)


def log_softmax(logits):
    """(T, V) logarithms of probabilities."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def plain_answer(model, ids, num_tokens, *, ends=(), seed=None):
    """What a model says to a prompt: the likeliest token, or the one that a random number draws
    from the probabilities, laid end to end in the order of the token ids.
    """
    given, written = tuple(map(int, ids)), []
    digest = hashlib.sha256(np.array(given, "<i8").tobytes()).digest()
    words = np.frombuffer(digest, "<u4")[:4].tolist()
    random = None if seed is None else np.random.default_rng([seed, *words])
    while len(written) < num_tokens and not {*written[-1:]} & {*ends}:
        last = plain_logits(model, [*given, *written])[-1:]
        if random is None:
            written.append(int(last.argmax()))
            continue
        places = np.exp(log_softmax(last))[0].cumsum()
        written.append(int((places <= random.random() * places[-1]).sum()))
    return Answer(given, tuple(written), bool({*written[-1:]} & {*ends}))
