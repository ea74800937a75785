"""Any model without weights, and its cut as a stock loader builds it from the shortened config.

Both are built on the meta device. A cut is made only if classes, shapes and plain attributes are
the same. So no stock loader builds another network than the one in memory.
"""

import copy
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.architecture import (
    DecoderLayers,
    adapter_lists,
    find_layers,
    packed_tables,
    text_config,
)
from ..models.layer_config import image_layers, shorten
from ..values.identity import Keyed
from ..values.layers import blocks_of

BUILDING_ERRORS = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    RuntimeError,
    ZeroDivisionError,
    StrictDataclassError,
    ModelError,
)
"""The errors of a model's constructor for a config that it does not support."""


PLACES = (
    "layer_idx",
    "layer_id",
    "layer_number",
    "kv_source_layer",  # that of Kolibri, whose list of them is checked
    "seed",  # BigBird's, whose causal model attends to all tokens
    "layer_block_map",
    "layer_dic",  # Zamba's, from a layer's place to that of its adapters
    "store_full_length_kv",  # Gemma's: the last layer of a kind, whose keys others may use
)
"""Attributes by which a module knows its place; none changes what a causal model computes."""


def built_from(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Build a model's class from a config without weights; do not change it, a few are kept."""
    content, kinds = config.to_dict(), (type(model), type(config))
    return _built(Keyed((*kinds, repr(content)), content))


@lru_cache(maxsize=8)
def _built(blueprint: Keyed[dict[str, Any]]) -> PreTrainedModel:
    kind, config, _ = blueprint.key
    with torch.device("meta"):
        built: PreTrainedModel = kind(config.from_dict(blueprint.value))
    return built


def shortened_config(model: PreTrainedModel, survivors: tuple[int, ...]) -> Any:
    """Make and check the config of a model with its ``survivors``; the model stays as it is."""
    return checked_twin(model, find_layers(model), survivors)[0]


def checked_twin(
    model: PreTrainedModel, found: DecoderLayers, survivors: tuple[int, ...]
) -> tuple[Any, PreTrainedModel]:
    """Make the shortened config, and the model on the meta device that a loader builds from it."""
    try:
        return _twin(model, found, survivors)
    except ModelError as error:
        others = _nearest(model, found, survivors)
        raise ModelError(f"{error}; {others}", see="families") from error


def _nearest(model: PreTrainedModel, found: DecoderLayers, survivors: tuple[int, ...]) -> str:
    """The nearest set of as many layers that could go, in words."""
    total = len(found)
    dropped = tuple(index for index in range(total) if index not in set(survivors))
    for other in _candidates(dropped, total)[:MAX_CANDIDATES]:
        try:
            _twin(model, found, tuple(index for index in range(total) if index not in other))
        except ModelError:
            continue
        blocks = ",".join(f"{block.start}:{block.stop}" for block in blocks_of(other))
        return f"the nearest {len(other)} layers that could go are {blocks}"
    return f"no {len(dropped)} layers near them could go"


MAX_CANDIDATES = 40
"""Sets of layers that are tried before it is said that none works."""


def _candidates(dropped: tuple[int, ...], total: int) -> list[tuple[int, ...]]:
    """Other sets of as many layers, nearest first: this one shifted, and contiguous blocks."""
    count = len(dropped)
    shifted = (tuple(index + by for index in dropped) for by in range(-total, total))
    blocks = (tuple(range(start, start + count)) for start in range(total - count + 1))
    inside = {c for c in (*shifted, *blocks) if c[0] >= 0 and c[-1] < total and c != dropped}

    def distance(other: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        return sum(abs(a - b) for a, b in zip(other, dropped, strict=True)), other

    return sorted(inside, key=distance)


def _twin(
    model: PreTrainedModel, found: DecoderLayers, survivors: tuple[int, ...]
) -> tuple[Any, PreTrainedModel]:
    for layer in image_layers(model.config):
        if [*survivors[layer : layer + 1]] != [layer]:
            raise ModelError(
                f"layer {layer} takes features of images (DeepStack): it must stay in its place",
                see="families",
            )
    config = copy.deepcopy(model.config)
    decoder = config.get_text_config(decoder=True)
    try:
        shorten(decoder, len(found), survivors)
        twin = built_from(model, config)
        layers = find_layers(twin).modules
    except BUILDING_ERRORS as error:
        raise ModelError(
            f"{type(model).__name__} cannot be built with the layers {list(survivors)} alone: "
            f"{' '.join(str(error).split())}",
            see="families",
        ) from error
    adapters = adapter_lists(model, found)
    try:
        for part in adapters:
            part.keep(survivors)
        difference = _differences(model, twin, layers, found, survivors, decoder)
    finally:
        for part in adapters:
            part.restore()
    if difference:
        raise ModelError(
            f"the config of {type(model).__name__} cannot describe this cut: {difference}",
            see="families",
        )
    return config, twin


def _differences(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    layers: nn.ModuleList,
    found: DecoderLayers,
    survivors: tuple[int, ...],
    config: Any,
) -> str | None:
    """The first difference between the cut model and the one that a stock loader builds."""
    read = vars(text_config(twin))
    for name, value in vars(config).items():
        if isinstance(value, list) and read.get(name, value) != value:
            return f"a stock loader would read {name} = {value} as {read[name]}"
    if len(layers) != len(survivors):
        return f"a stock loader would build {len(layers)} layers, not {len(survivors)}"
    if outside := _difference_outside(model, twin, found):
        return outside
    sharing = getattr(config, "num_kv_shared_layers", 0) or 0
    for new, old in enumerate(survivors):
        difference = _difference(found.modules[old], layers[new], sharing > 0)
        if difference:
            return (
                f"layer {old} would be layer {new}, and a stock loader would build it with "
                f"{difference}"
            )
    if _shared(found.modules[index] for index in survivors) != _shared(layers):
        return "its layers share weights, and a stock loader would share others"
    return None


def _difference_outside(
    model: PreTrainedModel, twin: PreTrainedModel, found: DecoderLayers
) -> str | None:
    """The first difference outside the layers, of weights that depend on their number."""
    built = _shapes_outside(twin, found.path)
    packed = {table.name for table in packed_tables(model, found)}
    for name, shape in _shapes_outside(model, found.path).items():
        twin_shape = built.pop(name, None)
        if shape is not None and twin_shape != shape and name not in packed:
            return f"{name} depends on the number of layers"
    return f"it would have other weights, such as {min(built)}" if built else None


def _shared(layers: Iterable[nn.Module]) -> set[frozenset[tuple[int, str]]]:
    """The groups of weights, by layer and name, that are one and the same."""
    groups: dict[int, set[tuple[int, str]]] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), set()).add((index, name))
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def _shapes_outside(model: PreTrainedModel, path: str) -> dict[str, torch.Size | None]:
    """The shapes of all weights but the layers'; None where they may be packed."""
    return {
        name: parameter.shape if parameter.is_floating_point() else None
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(path + ".")
    }


INITIAL = {
    ("MiniMaxLightningAttention", "num_hidden_layers"),
    ("Zamba2Attention", "num_fwd_mem_blocks"),
    ("Zamba2MLP", "num_fwd_mem_blocks"),
}
"""Attributes for construction only: of stored buffers, and of the lengths of lists."""


def _difference(layer: nn.Module, twin: nn.Module, sharing: bool) -> str | None:
    """The first difference between a layer and its twin; ``sharing``: of keys and values."""
    modules, twins = dict(layer.named_modules()), dict(twin.named_modules())
    if modules.keys() != twins.keys():
        return f"other modules: {sorted(modules.keys() ^ twins.keys())[:3]}"
    for path, module in modules.items():
        other = twins[path]
        if type(module) is not type(other) and not isinstance(other, nn.Linear):
            return f"{path or 'the layer'} a {type(other).__name__}, not a {type(module).__name__}"
        for name, value in plain_attributes(module).items():
            built = getattr(other, name, value)
            may_differ = name in PLACES and not (sharing and name == "store_full_length_kv")
            may_differ |= (type(module).__name__, name) in INITIAL
            if built != value and not may_differ and not _close(built, value):
                return f"{path + '.' if path else ''}{name} = {built!r}, not {value!r}"
        if type(module) is type(other):
            for name, parameter in other.named_parameters(recurse=False):
                shape = getattr(getattr(module, name), "shape", None)
                if shape != parameter.shape:
                    return f"{path}.{name} of shape {tuple(parameter.shape)}, not {shape}"
    return None


def _close(built: Any, expected: Any) -> bool:
    """Equal up to the rounding of a scale that was computed another way."""
    both = isinstance(built, float) and isinstance(expected, float)
    return both and math.isclose(built, expected, rel_tol=1e-12)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The numbers, words and switches that a module holds beside its weights."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith("_")
        and name not in ("training", "gradient_checkpointing")
    }
