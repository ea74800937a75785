"""Texts of known words."""

import copy
import random

import torch

from tests.conftest import WORDS


def documents(count, seed=0):
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(3, 20))) for _ in range(count)]


TEXTS = documents(24)
HELD_OUT = documents(8, seed=1)
PROBE = torch.arange(16).reshape(2, 8)


def state_of(model):
    """All that a cut could leave changed."""
    layers = model.model.layers
    with torch.inference_mode():
        logits = model(input_ids=PROBE, use_cache=True).logits
    return {
        "layers": [id(layer) for layer in layers],
        "places": [layer.self_attn.layer_idx for layer in layers],
        "modes": [module.training for module in model.modules()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "config": copy.deepcopy(model.config.to_dict()),
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "logits": logits,
    }


def assert_same(before, after):
    for name in ("layers", "places", "modes", "hooks", "config"):
        assert after[name] == before[name], name
    assert after["weights"].keys() == before["weights"].keys()
    assert all(
        torch.equal(after["weights"][key], before["weights"][key]) for key in after["weights"]
    )
    assert torch.equal(after["logits"], before["logits"])


class Unread:
    """Texts that must not be looked at."""

    def __iter__(self):
        raise AssertionError("the texts were read")


def once(texts):
    """Texts that can be read only once."""
    yield from texts


def broken_after(texts, count):
    yield from texts[:count]
    raise OSError("the disk went away")
