"""Dropping layers in memory, and saving what is left as a standard checkpoint.

A cut changes the module list, the layer count, the index that every layer keeps (``layer_idx``),
and every per-layer list of the config. It is compared with a fresh model, built from the new config
on the meta device: classes, shapes and plain attributes. A cut that differs is refused, so that no
stock loader builds another network than the one in memory.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.architecture import (
    DecoderLayers,
    decoder_configs,
    find_layers,
    layer_parts,
    undo_rescaling,
)
from ..models.decoder import Decoder
from ..models.experts import find_experts
from ..models.identity import model_name
from ..models.layer_config import layer_counts, shorten
from ..values.experts import DroppedExperts, Experts
from ..values.plan import Plan
from .experts import cut_experts
from .plans import NamedLayers, agreed_plan, made_for
from .twin import PLACES, checked_twin


def drop_layers(model: PreTrainedModel, layers: NamedLayers) -> Plan:
    """Remove layers from a model, in place, and the experts that a plan names.

    Args:
        model: a Llama-like causal language model of transformers, quantised or not.
        layers: a plan; blocks, ranges or indices, 0-based; or :class:`ForStates`.

    Returns:
        The plan that was carried out, with the identity of the uncut model. A plan keeps all that
        it knows, and so does a block that a scan chose: score, metric and texts.

    Raises:
        LayersError: a layer that is not there, is named twice, or is the last one left.
        ExpertsError: experts that are not there, or that a router cannot do without.
        PlanError: a plan that was made for another model.
        ModelError: no list of decoder layers, or a config that cannot describe the
            survivors. The model is then as it was.

    Example:
        >>> plan = sh.drop_layers(model, scan.plan(8))
        >>> model.config.num_hidden_layers, plan.strategy
        (22, 'similarity')
    """
    decoder = Decoder.of(model)
    plan = agreed_plan(model_name(model), len(decoder), layers)
    plan = made_for(plan, decoder.identity)
    _cut(model, decoder.layers, plan)
    return plan


def drop_experts(model: PreTrainedModel, experts: Experts | str) -> Plan:
    """Remove routed experts from a mixture, in place, as many from every layer that has any.

    Args:
        model: a causal language model of transformers whose experts lie in stacked weights.
        experts: by layer, 0-based, the indices of the experts that go; or a text of them, as
            ``0:3,5;1:2,7``.

    Returns:
        The plan that was carried out, with the identity of the whole model.

    Raises:
        ExpertsError: an expert or layer that is not there, other numbers in other layers, or
            experts that the router cannot do without.
        ModelError: no layer has experts, or no config describes the cut. The model is then as it
            was.

    Example:
        >>> plan = sh.drop_experts(mixture, {0: [3, 5], 1: [2, 7]})
        >>> mixture.config.num_local_experts
        6
    """
    decoder = Decoder.of(model)
    number = find_experts(model, decoder.layers)[0].num_experts
    plan = Plan(len(decoder), (), experts=DroppedExperts.of(number, experts))
    return drop_layers(model, plan)


@contextmanager
def without_layers(model: PreTrainedModel, layers: NamedLayers) -> Iterator[None]:
    """Run a body with the model without some layers; afterwards it is as before.

    Args:
        model: as for :func:`drop_layers`.
        layers: a plan; blocks, ranges or indices, 0-based; or :class:`ForStates`.

    Yields:
        Nothing; the given model is the cut one.

    Raises:
        LayersError, PlanError, ModelError: as :func:`drop_layers`.
    """
    decoder = Decoder.of(model)
    found = decoder.layers
    plan = agreed_plan(model_name(model), len(found), layers)
    if plan.model is not None:
        plan.check_model(decoder.identity)
    modules = found.modules
    places = [
        (module, name, vars(module)[name])
        for module in modules.modules()
        for name in PLACES
        if name in vars(module)
    ]
    configs = [(config, copy.copy(vars(config))) for config in _configs(model)]
    parts = layer_parts(model, found)
    ties = [(module, dict(_ties(module))) for module in model.modules()]
    device_map = copy.copy(getattr(model, "hf_device_map", None))
    put_back = _cut(model, found, plan)
    try:
        yield
    finally:
        put_back()
        undo_rescaling(model)
        setattr(found.owner, found.name, modules)
        for config, values in configs:
            vars(config).clear()
            vars(config).update(values)
        for module, name, place in places:
            setattr(module, name, place)
        for part in parts:
            part.restore()
        for module, values in ties:
            module.__dict__.update(values)
        if device_map is not None:
            setattr(model, "hf_device_map", device_map)  # noqa: B010


def _cut(model: PreTrainedModel, found: DecoderLayers, plan: Plan) -> Callable[[], None]:
    """Carry out a plan, and give what puts its experts back."""
    if plan.experts is None:
        _cut_layers(model, found, plan.survivors)
        return lambda: None
    if plan.blocks:  # refused, if it is, before anything changes
        checked_twin(model, found, plan.survivors)
    with ExitStack() as undo:
        undo.callback(cut_experts(model, plan.experts, gone=plan.dropped))
        if plan.blocks:
            _cut_layers(model, found, plan.survivors)
        return undo.pop_all().close


def _cut_layers(model: PreTrainedModel, found: DecoderLayers, survivors: tuple[int, ...]) -> None:
    total = len(found)
    twin = checked_twin(model, found, survivors)[1]
    undo_rescaling(model)
    for part in layer_parts(model, found):
        part.keep(survivors)
    for live in _configs(model):
        shorten(live, total, survivors)
    kept = [found.modules[index] for index in survivors]
    for layer, built in zip(kept, find_layers(twin).modules, strict=True):
        _take_places(layer, built)
    modules = dict(model.named_modules())
    for path, built in twin.named_modules():
        if path in modules:
            modules[path].__dict__.update(copy.deepcopy(_ties(built)))
    survived = nn.ModuleList(kept)
    survived.training = found.modules.training
    setattr(found.owner, found.name, survived)
    _renumber_device_map(model, found.path, survivors)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Those of :func:`decoder_configs` that count as many layers."""
    main, *copies = decoder_configs(model)
    return [main, *(one for one in copies if layer_counts(one) == layer_counts(main))]


def _ties(module: nn.Module) -> dict[str, Any]:
    """The attributes by which a module of transformers names shared weights, layers' among them."""
    names = ("_tied_weights_keys", "all_tied_weights_keys")
    return {name: vars(module)[name] for name in names if name in vars(module)}


def _take_places(layer: nn.Module, twin: nn.Module) -> None:
    for module, built in zip(layer.modules(), twin.modules(), strict=True):
        for name in PLACES:
            if name in vars(module) and name in vars(built):
                setattr(module, name, copy.copy(vars(built)[name]))


def _renumber_device_map(model: PreTrainedModel, path: str, survivors: tuple[int, ...]) -> None:
    device_map = getattr(model, "hf_device_map", None)
    if device_map is None:
        return
    position = {old: new for new, old in enumerate(survivors)}
    renamed = {}
    for name, device in device_map.items():
        rest = name.removeprefix(path + ".")
        index, _, tail = rest.partition(".")
        if rest == name or not index.isdigit():
            renamed[name] = device
        elif int(index) in position:
            renamed[".".join(filter(None, (path, str(position[int(index)]), tail)))] = device
    setattr(model, "hf_device_map", renamed)  # noqa: B010
