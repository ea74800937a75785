"""Batches of tokens, and the states that a plain forward gives of them."""

import torch

from shallower.models.architecture import find_layers


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
