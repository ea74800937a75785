"""Dropping layers in memory, and saving what is left as a standard checkpoint.

A cut changes the module list, the layer count, what every layer knows of its place
(``layer_idx``), and every per-layer list of the config, by surviving index. It is made only
if a fresh model built from the new config has the same layers: classes, shapes and plain
attributes are compared on the meta device first, so that no stock loader builds another
network than the one in memory.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .artifacts import PLAN_FILE, Layers, Loss, Plan, blocks_of, dropped_layers
from .errors import ModelError, OutputError, PlanError
from .exports import CARD_FILE, exports, range_list
from .models.architecture import (
    DecoderLayers,
    adapter_lists,
    find_layers,
    layer_parts,
    packed_tables,
    require_weights,
    text_config,
    undo_rescaling,
)
from .models.identity import identify, stored_dtype
from .models.quantised import check_exact, clear_gguf_marks
from .models.shortening import layer_counts, shorten
from .storage import new_folder

_BUILDING_ERRORS = (
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
"""What a model's constructor raises for a config that it does not support."""


def drop_layers(model: PreTrainedModel, layers: Layers) -> Plan:
    """Remove layers from a model, in place.

    Args:
        model: a Llama-like causal language model of transformers, quantised or not.
        layers: blocks, ranges or indices, 0-based.

    Returns:
        The plan that was carried out, with the identity of the uncut model.

    Raises:
        LayersError: a layer that is not there, is named twice, or is the last one left.
        ModelError: no list of decoder layers, or a config that cannot describe the
            survivors. The model is then as it was.
    """
    found = find_layers(model)
    dropped = dropped_layers(len(found), layers)
    plan = Plan(len(found), blocks_of(dropped), model=identify(model))
    _cut(model, found, plan.survivors)
    return plan


@contextmanager
def without_layers(model: PreTrainedModel, layers: Layers) -> Iterator[None]:
    """The model without some layers, for as long as the body runs.

    Raises:
        LayersError, ModelError: as :func:`drop_layers`.
    """
    found = find_layers(model)
    dropped = set(dropped_layers(len(found), layers))
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
    survivors = tuple(index for index in range(len(found)) if index not in dropped)
    _cut(model, found, survivors)
    try:
        yield
    finally:
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


def _cut(model: PreTrainedModel, found: DecoderLayers, survivors: tuple[int, ...]) -> None:
    total = len(found)
    twin = _checked_twin(model, found, survivors)[1]
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
            modules[path].__dict__.update(_ties(built))
    setattr(found.owner, found.name, nn.ModuleList(kept))
    _renumber_device_map(model, found.path, survivors)


def _configs(model: PreTrainedModel) -> list[Any]:
    """The config of a model's decoder, with its copies in the modules."""
    main = text_config(model)
    seen = {id(main): main}
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is type(main) and layer_counts(config) == layer_counts(main):
            seen.setdefault(id(config), config)
    return list(seen.values())


PLACES = (
    "layer_idx", "layer_id", "layer_number",
    "seed",  # BigBird's, whose causal model attends to all tokens
    "layer_block_map", "layer_dic",  # Zamba's, from a layer's place to that of its adapters
    "store_full_length_kv",  # Gemma's: the last layer of a kind, whose keys others may use
)  # fmt: skip
"""Attributes by which a module knows its place; none changes what a causal model computes."""


def _ties(module: nn.Module) -> dict[str, Any]:
    """What a model of transformers knows of shared weights, if by the numbers of its layers."""
    names = ("_tied_weights_keys", "all_tied_weights_keys")
    return {name: vars(module)[name] for name in names if name in vars(module)}


def _take_places(layer: nn.Module, twin: nn.Module) -> None:
    for module, built in zip(layer.modules(), twin.modules(), strict=True):
        for name in PLACES:
            if name in vars(module) and name in vars(built):
                setattr(module, name, vars(built)[name])


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


def shortened_config(model: PreTrainedModel, survivors: tuple[int, ...]) -> Any:
    """The config of a model with these layers alone, checked; the model stays as it is.

    Args:
        model: with weights, or on the meta device without any.
        survivors: the indices of the layers that stay, ascending.

    Raises:
        ModelError: a model built from the new config would have other layers.
    """
    return _checked_twin(model, find_layers(model), survivors)[0]


def _checked_twin(
    model: PreTrainedModel, found: DecoderLayers, survivors: tuple[int, ...]
) -> tuple[Any, PreTrainedModel]:
    """The shortened config, and what a stock loader builds from it, on the meta device."""
    try:
        return _twin(model, found, survivors)
    except ModelError as error:
        others = _nearest(model, found, survivors)
        raise ModelError(f"{error}; {others}") from error


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
    config = copy.deepcopy(model.config)
    decoder = config.get_text_config(decoder=True)
    try:
        shorten(decoder, len(found), survivors)
        with torch.device("meta"):
            twin = type(model)(type(config).from_dict(config.to_dict()))
        layers = find_layers(twin).modules
    except _BUILDING_ERRORS as error:
        raise ModelError(
            f"{type(model).__name__} cannot be built with the layers {list(survivors)} alone: "
            f"{' '.join(str(error).split())}"
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
            f"the config of {type(model).__name__} cannot describe this cut: {difference}"
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
    """How the model that a stock loader builds differs from the cut one, in words."""
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
    """What lies outside the layers and depends on their number."""
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
"""Attributes that are used at construction only: for buffers that a checkpoint holds, and for
the length of lists, which is compared."""


def _difference(layer: nn.Module, twin: nn.Module, sharing: bool) -> str | None:
    """What a stock loader would build otherwise, in words.

    Args:
        layer: as it is.
        twin: as a stock loader builds it.
        sharing: whether layers use the keys and values that earlier ones store.
    """
    modules, twins = dict(layer.named_modules()), dict(twin.named_modules())
    if modules.keys() != twins.keys():
        return f"other modules: {sorted(modules.keys() ^ twins.keys())[:3]}"
    for path, module in modules.items():
        other = twins[path]
        if type(module) is not type(other) and not isinstance(other, nn.Linear):
            return f"{path or 'the layer'} a {type(other).__name__}, not a {type(module).__name__}"
        for name, value in _plain_attributes(module).items():
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


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith("_")
        and name not in ("training", "gradient_checkpointing")
    }


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    plan: Plan | None = None,
    overwrite: bool = False,
    losses: tuple[Loss, Loss] | None = None,
) -> None:
    """Save a standard checkpoint, whole or not at all, that stock transformers loads.

    With a plan, the plan itself, a model card and what mergekit and llama.cpp need for the
    same cut lie beside the weights (``exports.EXPORT_FILES``).

    Args:
        model: cut or not; a 4-bit model becomes a standard 4-bit checkpoint.
        tokenizer: saved beside it, unless ``None``.
        path: a folder that does not exist yet, or is empty.
        plan: what was dropped; saved as ``shallower_plan.json``.
        overwrite: replace what is at ``path``, once the new checkpoint is complete.
        losses: the held-out loss before and after the cut, for the model card.

    Raises:
        PlanError: ``plan`` leaves another number of layers than the model has.
        OutputError: ``path`` holds something already, or cannot be written to.
        ModelError: weights that cannot be saved as they are.
    """
    check_exact(model)
    require_weights(model)
    texts = {} if plan is None else _exports(model, plan, losses)
    undo_rescaling(model)
    if str(getattr(model, "quantization_method", "")).endswith(("GGUF", "gguf")):
        clear_gguf_marks(model)
    dtype = model.config.dtype
    with new_folder(Path(path), overwrite) as folder:
        try:
            model.save_pretrained(folder)
            model.config.dtype = dtype  # which save_pretrained turns into a word
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {path}: {error}") from error
        except (ValueError, NotImplementedError) as error:
            message = f"transformers cannot save {type(model).__name__}: {error}"
            raise ModelError(message) from error
        if plan is not None:
            plan.save(folder / PLAN_FILE)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def _exports(
    model: PreTrainedModel, plan: Plan, losses: tuple[Loss, Loss] | None
) -> dict[str, str]:
    left = len(find_layers(model))
    if len(plan.survivors) != left:
        raise PlanError(
            f"the plan leaves {len(plan.survivors)} layers, and the model has {left}: save the "
            f"model that the plan was carried out on"
        )
    source = str(model.name_or_path) or (plan.model.name if plan.model else type(model).__name__)
    dtype = stored_dtype(model)
    python = (
        f"model, tokenizer = sh.load_model({source!r}, dtype={dtype!r})\n"
        f"plan = sh.drop_layers(model, {range_list(plan)})\n"
        f"sh.save_model(model, tokenizer, 'cut', plan)"
    )
    options = ("--dtype", dtype)
    return exports(plan, source, python, options, dtype, Path(source) / CARD_FILE, losses)
