"""What a layer misses of the whole model's states, as equations in its writers' inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import PatchError
from ..models.layerwise import Layerwise
from ..models.residual_writers import Writer
from ..texts.batches import Batch
from .held_out import HeldOut
from .least_squares import NormalEquations
from .states import StateSet, first_rows, other_rows

FARTHEST = 12.0
"""How far a text's first token is moved at most, in mean norms of the other tokens' states.

It carries massive activations (Sun et al., 2402.17762), some hundred times as long, that one layer
makes. Where that layer is dropped, all of them are out of reach of one matrix, and what comes near
costs the other tokens; norms stand before all that reads the stream, so that a part does as well.
"""

TINY = torch.finfo(torch.float32).tiny


def missing_equations(
    model: Layerwise,
    layer: int,
    writers: Sequence[Writer],
    *,
    states: StateSet,
    ran: Callable[[int], None] = lambda _batches: None,
) -> NormalEquations:
    """Run a layer, and sum up what is missing behind it to the whole model's states.

    Args:
        model: whose layers can be run by themselves.
        layer: its index.
        writers: of the layer; their inputs, joined, are those of the equations.
        states: batches, the cut model's states before the layer, and the whole model's states
            that are to be reached behind it; first tokens come as near as :data:`FARTHEST` lets
            them.
        ran: is told of every batch.

    Returns:
        The normal equations in F inputs and D outputs; the first tokens of the texts are kept
        apart, and padding is in neither.
    """
    equations: NormalEquations | None = None
    for batch, inputs, missing, _ in _rows(model, layer, writers, states):
        if equations is None:
            sizes = inputs.shape[-1], missing.shape[-1]
            equations = NormalEquations.empty(*sizes, inputs.device)
        equations.add(other_rows(batch, inputs), other_rows(batch, missing))
        equations.keep(first_rows(batch, inputs), first_rows(batch, missing))
        ran(1)
    assert equations is not None
    return equations


def missing_rows(
    model: Layerwise,
    layer: int,
    writers: Sequence[Writer],
    *,
    states: StateSet,
    ran: Callable[[int], None] = lambda _batches: None,
) -> HeldOut:
    """Run a layer on held-out texts, and keep what is missing behind it token by token.

    Args:
        model: whose layers can be run by themselves.
        layer: its index.
        writers: as for :func:`missing_equations`.
        states: likewise, of held-out texts.
        ran: is told of every batch.

    Returns:
        The inputs of the writers, joined, and what is missing, without padding.
    """
    held_out = HeldOut()
    kinds = (held_out.others, other_rows), (held_out.firsts, first_rows)
    for batch, inputs, missing, aim in _rows(model, layer, writers, states):
        for rows, take in kinds:
            rows.parts.append((take(batch, inputs), take(batch, missing)))
            rows.reached += float(take(batch, aim).double().square().sum())
        ran(1)
    return held_out


def _rows(
    model: Layerwise, layer: int, writers: Sequence[Writer], states: StateSet
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run a layer batch by batch: (B, T, F) inputs, and what is missing to (B, T, D) states.

    Then the (B, T, D) states that are aimed at: with first tokens no farther than ``FARTHEST``.
    """
    for index, batch in enumerate(states.batches):
        with _inputs([writer.module for writer in writers]) as taken:
            output = model.run(batch, states.cut[index], (layer,))
        inputs = torch.cat([x.view(*output.shape[:2], -1) for x in taken()], dim=-1)
        aim = states.whole[index].to(output.device, torch.float32, copy=True)
        missing = aim - output.float()
        missing[:, 0] *= _share_within_reach(batch, aim, missing[:, 0])
        aim[:, 0] = output[:, 0].float() + missing[:, 0]
        yield batch, inputs, missing, aim


def _share_within_reach(batch: Batch, aim: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """(B, 1): how much of what is missing at the first tokens, (B, D), is aimed at."""
    others = torch.from_numpy(batch.attention_mask[:, 1:]).to(aim)
    mean = (aim[:, 1:].norm(dim=-1) * others).sum(-1) / others.sum(-1).clamp(min=1.0)
    return (FARTHEST * mean / first.norm(dim=-1).clamp(min=TINY)).clamp(max=1.0)[:, None]


def no_writer(layer: int) -> PatchError:
    """Say that a layer cannot be solved anew.

    Args:
        layer: its index, before a block.

    Returns:
        The error.
    """
    return PatchError(
        f"layer {layer}, before the block, does not write into the residual stream by a plain "
        f"linear map (experts, a norm behind it, or quantised weights): load the model "
        f"unquantised, or drop another block"
    )


def not_finite() -> PatchError:
    """Say that states are not numbers.

    Returns:
        The error.
    """
    return PatchError(
        "the states before a block are not finite: load the model as bfloat16 or float32 (--dtype)"
    )


@contextmanager
def _inputs(modules: Sequence[nn.Module]) -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Watch modules; gives a function that returns their last inputs."""
    taken: dict[int, torch.Tensor] = {}

    def keep(place: int) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            taken[place] = args[0]

        return hook

    handles = [m.register_forward_pre_hook(keep(place)) for place, m in enumerate(modules)]
    try:
        yield lambda: [taken[place] for place in range(len(modules))]
    finally:
        for handle in handles:
            handle.remove()
