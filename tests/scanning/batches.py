"""Batches of tokens, and the states that a plain forward gives of them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shallower.models.architecture import find_layers


class Embedded(TorchDispatchMode):
    """Count the forwards of models, without a hook, by what each begins with."""

    times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times += function is torch.ops.aten.embedding.default
        return function(*args, **(kwargs or {}))


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
