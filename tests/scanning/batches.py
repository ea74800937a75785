"""Batches of tokens, and the states that a plain forward gives of them."""

from contextlib import contextmanager
from unittest.mock import patch

import torch

from shallower.models.architecture import find_layers


@contextmanager
def embeddings():
    """Count the forwards of models, without a hook, by what each begins with: a list of ones."""
    found, embedding = [], torch.embedding

    def counted(*args, **options):
        found.append(1)
        return embedding(*args, **options)

    with patch.object(torch, "embedding", counted):
        yield found


def plain_states(model, sequence):
    """The states of one text on its own, by a plain forward and one hook of this test's."""
    kept = []
    layers = find_layers(model).modules
    handle = layers[-1].register_forward_hook(
        lambda _module, _args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([sequence]), output_hidden_states=True).hidden_states
    handle.remove()
    return torch.stack([*(state[0, -1] for state in hidden[:-1]), kept[0][0, -1]]), hidden[-1][
        0, -1
    ]


def interrupted(texts, at):
    yield from texts[:at]
    raise KeyboardInterrupt
