"""Experts removed from a model in memory, checked against the one that a stock loader builds.

Tensors that hold a part for every expert are found by comparison with a fresh model on the meta
device, whose config has fewer experts. Wherever its shapes are smaller, the experts lie along that
axis: stacked weights, rows of a router, biases of its choice. Anything else that differs is
refused, and the model stays as it was.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.architecture import DecoderLayers, decoder_configs, find_layers
from ..models.experts import RoutedExperts, count_keys, find_experts, routing_of
from ..models.offload import bring_part
from ..values.experts import DroppedExperts
from ..values.plan import Plan
from .mixture import Mixture
from .twin import BUILDING_ERRORS, built_from, plain_attributes, shortened_config

Changes = dict[tuple[str, str], int]
"""What changes in a layer, by the path of a module and the name in it.

Of a tensor the axis along which the experts lie; of an attribute its new number.
"""


def part_of(
    tensor: torch.Tensor, axis: int, *, kept: Sequence[int], num_experts: int
) -> torch.Tensor:
    """The parts of the experts that stay, in a tensor of its own."""
    parts = tensor.detach().unflatten(axis, (num_experts, -1))
    places = torch.tensor(kept, device=tensor.device)
    return parts.index_select(axis, places).flatten(axis, axis + 1)


def cut_experts(
    model: PreTrainedModel, dropped: DroppedExperts, gone: Sequence[int] = ()
) -> Callable[[], None]:
    """Remove experts from a model, in place, and give what puts them back.

    ``gone`` are layers that go whole afterwards. Raises ExpertsError, ModelError.
    """
    found = find_layers(model)
    experts = find_experts(model, found)
    mixture_of(model, experts).check(dropped, gone)
    changes = compare_layers(model, found, with_fewer_experts(model, dropped), dropped=dropped)
    with ExitStack() as undo:  # where a device has no room for the parts, too
        for one in experts:
            if one.layer in dropped.by_layer:
                layer, kept = found.modules[one.layer], dropped.kept(one.layer)
                _divide(layer, changes[one.layer], dropped, kept=kept, undo=undo)
        for config, name in _counts(model, dropped.num_experts):
            _put(config, name, dropped.num_kept, undo=undo)
        return undo.pop_all().close


def mixture_of(model: nn.Module, experts: Sequence[RoutedExperts]) -> Mixture:
    """The routed experts of a model, with weights or without, for the checks of a cut."""
    routing = routing_of(model, experts[0].num_experts)
    return Mixture(type(model).__name__, routing, frozenset(one.layer for one in experts))


def with_fewer_experts(model: PreTrainedModel, dropped: DroppedExperts) -> PreTrainedModel:
    """Build the model without so many experts, and without weights; ModelError if it cannot be."""
    config = copy.deepcopy(model.config)
    for part, name in count_keys(config.get_text_config(decoder=True), dropped.num_experts):
        setattr(part, name, dropped.num_kept)
    try:
        return built_from(model, config)
    except BUILDING_ERRORS as error:
        raise ModelError(
            f"{type(model).__name__} cannot be built with {dropped.num_kept} experts a layer: "
            f"{' '.join(str(error).split())}",
            see="experts",
        ) from error


def config_left(model: PreTrainedModel, plan: Plan) -> Any:
    """The config of what a plan leaves of a model, with weights or without; raises as the cut."""
    if plan.experts is not None:
        found = find_layers(model)
        mixture_of(model, find_experts(model, found)).check(plan.experts, plan.dropped)
        whole, model = model, with_fewer_experts(model, plan.experts)
        compare_layers(whole, found, model, dropped=plan.experts)
    return shortened_config(model, plan.survivors) if plan.blocks else copy.deepcopy(model.config)


def compare_layers(
    model: PreTrainedModel,
    found: DecoderLayers,
    twin: PreTrainedModel,
    *,
    dropped: DroppedExperts,
) -> dict[int, Changes]:
    """What a twin of fewer experts has otherwise in every layer; ModelError if that is too much."""
    number, num_kept = dropped.num_experts, dropped.num_kept
    built = find_layers(twin)
    changes = {}
    for one in find_experts(twin, built):
        if one.num_experts != num_kept:
            raise ModelError(
                f"the config of {type(model).__name__} does not say how many experts a layer has: "
                f"a stock loader would build {one.num_experts}, not {num_kept}",
                see="experts",
            )
        pair = found.modules[one.layer], built.modules[one.layer]
        changes[one.layer] = _changes(one, *pair, number=number, num_kept=num_kept)
    return changes


def _changes(
    one: RoutedExperts, layer: nn.Module, built: nn.Module, *, number: int, num_kept: int
) -> Changes:
    """What differs between a layer and the one that a stock loader builds with fewer experts."""
    changes = {}
    others = dict(built.named_modules())
    for path, module in layer.named_modules():
        other = others[path]
        for name, tensor, small in _tensors(module, other):
            place = f"layer {one.layer}: {path}.{name}"
            inside = path.startswith(one.block)
            if inside and not (tensor.is_floating_point() or tensor.is_complex()):
                raise ModelError(
                    f"{place} holds integers beside the router, as a table that sends tokens to "
                    f"experts by their number: no expert can go"
                )
            if tensor.shape == small:
                continue
            axes = [a for a, size in enumerate(tensor.shape) if size != small[a]]
            size = tensor.shape[axes[0]]
            if len(axes) > 1 or size % number or small[axes[0]] * number != size * num_kept:
                raise ModelError(
                    f"{place} of shape {tuple(tensor.shape)} has more than a part for each of "
                    f"{number} experts, since with {num_kept} it would be {tuple(small)}: no "
                    f"expert can go"
                )
            changes[path, name] = axes[0]
        before_of = plain_attributes(module)
        for name, value in plain_attributes(other).items():
            before = before_of.get(name, value)
            if before == value:
                continue
            if (
                type(before) is not int
                or type(value) is not int
                or before * num_kept != value * number
            ):
                raise ModelError(
                    f"layer {one.layer}: {path}.{name} is {before!r}, and a stock loader would "
                    f"make it {value!r} with {num_kept} experts: no expert can go"
                )
            changes[path, name] = value
    return changes


def _tensors(module: nn.Module, other: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Size]]:
    """The weights and buffers of a module, with their shapes in another one."""
    for held, built in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
        for name, tensor in held.items():
            if tensor is None:
                continue
            small = built.get(name)
            if small is None or small.ndim != tensor.ndim:
                raise ModelError(
                    f"{name} of {type(module).__name__} is packed, or not as a stock loader builds "
                    f"it: load the model in a plain dtype"
                )
            yield name, tensor, small.shape


def _divide(
    layer: nn.Module,
    changes: Changes,
    dropped: DroppedExperts,
    *,
    kept: Sequence[int],
    undo: ExitStack,
) -> None:
    """Carry out the changes of a layer; ``undo`` gets what takes each back."""
    for (path, name), value in changes.items():
        module = layer.get_submodule(path)
        held: Any = module._parameters if name in module._parameters else module._buffers
        if name not in held:
            _put(module, name, value, undo=undo)
            continue
        cut = partial(part_of, axis=value, kept=kept, num_experts=dropped.num_experts)
        whole = held[name]
        if whole.is_meta:
            undo.callback(bring_part(module, name, cut))
        part = cut(whole)
        if isinstance(whole, nn.Parameter):
            part = nn.Parameter(part, whole.requires_grad)
        held[name] = part
        undo.callback(held.update, {name: whole})


def _put(owner: Any, name: str, value: int, *, undo: ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _counts(model: PreTrainedModel, number: int) -> list[tuple[Any, str]]:
    """All keys that count experts, in the model's config and in the copies in its modules."""
    found = {}
    for config in decoder_configs(model):
        for owner, name in count_keys(config, number):
            found[id(owner), name] = owner, name
    return list(found.values())
