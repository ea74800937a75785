"""Every family with routed experts as a small random mixture, and its oracle.

The oracle is the uncut model in which the dropped experts cannot be chosen: their logits are −∞,
and so is the bias of their choice, where the router has one."""

from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from shallower.models.architecture import find_layers
from shallower.models.experts import count_keys, find_experts
from tests.families import IS_OLDER, small_config, small_weights

NUM_EXPERTS = 6


def mixture(name, num_experts=NUM_EXPERTS, **changes):
    """A small random model of a family, with biases of the choice that decide."""
    if IS_OLDER and name == "dbrx":
        pytest.skip("the config of DBRX does not take back what it writes")
    config = small_config(name)
    decoder = config.get_text_config(decoder=True)
    for owner, key in count_keys(decoder, 4):
        setattr(owner, key, num_experts)
    for key, value in changes.items():
        setattr(decoder, key, value)
    torch.manual_seed(0)
    model = small_weights(
        AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()))
    )
    generator = torch.Generator().manual_seed(3)
    for key, buffer in model.named_buffers():
        if "bias" in key and buffer.is_floating_point():
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


class Unchosen(TorchFunctionMode):
    """Sets logits of routers to −∞, by the places of their weights in memory."""

    def __init__(self, rows):
        self.rows = rows
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if (rows := self.rows.get(weight.data_ptr())) is not None:
                out[..., rows] = -torch.inf
        return out


@contextmanager
def unchosen(model, dropped):
    """Let no token choose the experts, which are named by layer."""
    rows, biases = {}, []
    for one in find_experts(model):
        gone = list(dropped[one.layer])
        layer = find_layers(model).modules[one.layer]
        inner = {id(tensor) for tensor in one.module.parameters()}
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if id(tensor) in inner or one.num_experts not in tensor.shape or "scale" in name:
                continue
            if tensor.ndim == 2 and tensor.shape[0] == one.num_experts:
                rows[tensor.data_ptr()] = gone
            elif "bias" in name and "router.bias" not in name:
                biases.append((tensor, tensor.detach().clone()))
                with torch.no_grad():
                    tensor[..., gone] = -torch.inf
    try:
        with Unchosen(rows):
            yield
    finally:
        for tensor, before in biases:
            with torch.no_grad():
                tensor.copy_(before)


def some_experts(model, count=2, seed=0):
    """As many experts of every layer that has any, drawn."""
    generator = torch.Generator().manual_seed(seed)
    return {
        one.layer: sorted(torch.randperm(one.num_experts, generator=generator)[:count].tolist())
        for one in find_experts(model)
    }
