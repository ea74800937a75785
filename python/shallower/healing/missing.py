"""What a layer misses of the whole model's states, as equations in its writers' inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import PatchError
from ..models.layerwise import Layerwise
from ..models.residual_writers import Writer
from .least_squares import NormalEquations
from .patch_states import StateSet, first_rows, other_rows


def missing_equations(
    model: Layerwise, layer: int, writers: Sequence[Writer], *, states: StateSet
) -> NormalEquations:
    """Run a layer, and sum up what is missing behind it to the whole model's states.

    Args:
        model: whose layers can be run by themselves.
        layer: its index.
        writers: of the layer; their inputs, joined, are those of the equations.
        states: batches, the cut model's states before the layer, and the whole model's states
            that are to be reached behind it.

    Returns:
        The normal equations in F inputs and D outputs; the first tokens of the texts are kept
        apart, and padding is in neither.
    """
    equations: NormalEquations | None = None
    for index, batch in enumerate(states.batches):
        with _inputs([writer.module for writer in writers]) as taken:
            output = model.run(batch, states.cut[index], (layer,))
        inputs = torch.cat([x.view(*output.shape[:2], -1) for x in taken()], dim=-1)
        missing = states.whole[index].to(output.device).float() - output.float()
        if equations is None:
            sizes = inputs.shape[-1], missing.shape[-1]
            equations = NormalEquations.empty(*sizes, inputs.device)
        equations.add(other_rows(batch, inputs), other_rows(batch, missing))
        equations.keep(first_rows(batch, inputs), first_rows(batch, missing))
    assert equations is not None
    return equations


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
