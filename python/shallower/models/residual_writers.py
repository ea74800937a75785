"""The linear maps by which a layer writes into the residual stream, found by probing.

They are the last matrices of attention and feed-forward (``o_proj`` and ``down_proj`` of a Llama).
What is added to a candidate's output must appear in the layer's, times one number.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..texts.batches import Batch
from .layerwise import Layerwise, token_rows
from .offload import stored_weight

TOLERANCE = 0.02
"""Deviation of a probe from what was added, at most, as a share: several roundings of bfloat16."""


@dataclass(frozen=True, slots=True)
class Writer:
    """A linear map into the residual stream."""

    name: str  # its name in the layer
    module: nn.Module  # an `nn.Linear`, or a transposed `Conv1D` of transformers
    scale: float  # of its output on its way into the stream

    @property
    def weight(self) -> torch.Tensor:
        """(D, inputs), a view of the stored weight, which is on the CPU if it is offloaded."""
        return self.turned(stored_weight(self.module, "weight").detach())

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """Transpose a weight from (D, inputs) to the module's own layout, or back; a view."""
        return weight.T if isinstance(self.module, Conv1D) else weight


@dataclass(frozen=True, slots=True)
class Writers:
    """The last matrices of one layer's parts; None where one is not a plain linear map."""

    attention: Writer | None
    feed_forward: Writer | None


@torch.inference_mode()
def find_writers(model: Layerwise, layer: int, *, batch: Batch, states: torch.Tensor) -> Writers:
    """Find a layer's writers by probing them on (B, T, D), its inputs on a batch."""
    found = {
        name: module
        for name, module in model.modules[layer].named_modules()
        if _is_plain(module, states.shape[-1])
    }
    order = _order(model, layer, batch, states, found)
    if not order:
        return Writers(None, None)
    last = order[-1]
    scale = _scale(model, layer, batch, states, found[last])
    if scale is None:
        return Writers(None, None)
    attention = None
    for name in reversed(order[:-1]):
        of_attention = _scale(model, layer, batch, states, found[name], silent=found[last])
        if of_attention is not None:
            attention = Writer(name, found[name], of_attention)
            break
    return Writers(attention, Writer(last, found[last], scale))


def _is_plain(module: nn.Module, width: int) -> bool:
    """Whether a module is a linear map of floating-point weights to ``width`` values."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return False
    if isinstance(module, Conv1D):
        return bool(module.nf == width)
    return isinstance(module, nn.Linear) and weight.shape == (width, module.in_features)


def _order(
    model: Layerwise, layer: int, batch: Batch, states: torch.Tensor, found: dict[str, nn.Module]
) -> list[str]:
    """The names of the modules that run once, in the order in which they do, on all tokens."""
    ran: list[str] = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.numel() == states.numel():
                ran.append(name)

        return hook

    with ExitStack() as stack:
        for name, module in found.items():
            stack.enter_context(module.register_forward_hook(note(name)))
        model.run(batch, states, (layer,))
    return [name for name in ran if ran.count(name) == 1]


def _scale(
    model: Layerwise,
    layer: int,
    batch: Batch,
    states: torch.Tensor,
    module: nn.Module,
    silent: nn.Module | None = None,
) -> float | None:
    """The factor of a module's output on its way into the stream; None if it is not a plain sum.

    The output of ``silent`` is taken as zero.
    """
    with _output(silent, torch.zeros_like):
        before = model.run(batch, states, (layer,)).float()
        signs = torch.rand(before.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        probe = (before.abs() + before.square().mean().sqrt()) * (2.0 * signs.to(before) - 1.0)
        with _output(module, lambda output: output + probe.to(output).view_as(output)):
            after = model.run(batch, states, (layer,)).float()
    # Every element counts alike, however massive its channel.
    ratio = token_rows(batch, after - before) / token_rows(batch, probe)
    mean = ratio.mean()
    scale, deviation = torch.stack([mean, (ratio - mean).abs().max()]).tolist()
    if abs(scale) < TOLERANCE or not deviation <= 4 * TOLERANCE * abs(scale):
        return None
    return 1.0 if abs(scale - 1.0) < TOLERANCE else float(scale)


def _output(module: nn.Module | None, change: Any) -> AbstractContextManager[object]:
    """Change what a module gives while the body runs; nothing without one."""
    if module is None:
        return nullcontext()
    return module.register_forward_hook(lambda _module, _args, output: change(output))
