"""The decoder layers of a model and the parts that go with them, found by structure."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .layer_config import layer_counts
from .offload import execution_device


@dataclass(frozen=True, slots=True)
class DecoderLayers:
    """The decoder layers of a model."""

    owner: nn.Module  # of the list
    name: str  # of the list in `owner`
    path: str  # of the list in the model, such as `model.layers`
    runner: nn.Module  # the model without its head, whose forward takes token ids

    @property
    def modules(self) -> nn.ModuleList:
        """The layers, as the model runs them."""
        return getattr(self.owner, self.name)

    def __len__(self) -> int:
        return len(self.modules)


def text_config(model: nn.Module) -> Any:
    """Find the config of a model's decoder, of the text part if several; ModelError for none."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(
            f"{type(model).__name__} has no transformers config: expected a causal language model "
            f"of transformers"
        )
    return config.get_text_config(decoder=True)


def decoder_configs(model: nn.Module) -> list[Any]:
    """The config of a model's decoder, and its copies in the modules; ModelError for none."""
    main = text_config(model)
    configs = (getattr(module, "config", None) for module in model.modules())
    found = {id(one): one for one in (main, *configs) if type(one) is type(main)}
    return list(found.values())


def find_layers(model: nn.Module) -> DecoderLayers:
    """Find the list of decoder layers, with weights or on the meta device.

    It is the decoder's module list of as many modules as its config counts, and the one with the
    most parameters if there are several. A ModelError refuses layers whose parts are spread over
    several.
    """
    config = text_config(model)
    counts = set(layer_counts(config).values())
    if isinstance(count := vars(config).get("num_layers"), int):
        counts.add(count)  # LongCat-Flash counts two attentions a layer first
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    fitting = [item for item in lists if len(item[1]) in counts]
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    inside = {id(module) for module in decoder.modules()}
    fitting = [item for item in fitting if id(item[1]) in inside] or fitting
    if not fitting:
        seen = ", ".join(f"{path} ({len(module)})" for path, module in lists) or "none"
        raise ModelError(
            f"no list of {' or '.join(map(str, sorted(counts))) or 'the'} decoder layers in "
            f"{type(model).__name__}; its module lists: {seen}",
            see="families",
        )
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in fitting}
    path = max(sizes, key=lambda path: sizes[path])
    parent, _, name = path.rpartition(".")
    spread = [p for p in sizes if p.rpartition(".")[0] == parent and 100 * sizes[p] > sizes[path]]
    if len(spread) > 1:
        raise ModelError(
            f"{type(model).__name__} spreads its layers over several lists, {', '.join(spread)}: "
            f"expected one list of whole decoder layers",
            see="families",
        )
    return DecoderLayers(model.get_submodule(parent), name, path, _runner(model, parent))


def beside_layers(module: nn.Module, path: str, prefix: str = "") -> Iterator[str]:
    """The names of the largest parts of a module that have no part in the list at ``path``."""
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name
    for name, child in module.named_children():
        full = prefix + name
        if path.startswith(full + "."):
            yield from beside_layers(child, path, full + ".")
        elif full != path:
            yield full


def _runner(model: nn.Module, path: str) -> nn.Module:
    """Find the innermost model of transformers around a module."""
    while path and not isinstance(model.get_submodule(path), PreTrainedModel):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


PACKED_TABLES = {
    "embed_tokens_per_layer.weight": 1,
    "per_layer_model_projection.weight": 0,
}
"""Weights beside the layers that hold a part for each, by axis: embeddings of Gemma 3n and 4."""


class PackedTable:
    """A weight with a part for every layer, along ``axis``."""

    def __init__(self, model: nn.Module, name: str, axis: int, num_layers: int) -> None:
        self.name, self.axis = name, axis
        path, _, self._key = name.rpartition(".")
        self._module = model.get_submodule(path)
        self._whole = getattr(self._module, self._key)
        self._num_layers = num_layers

    def keep(self, layers: Sequence[int]) -> None:
        """Keep the parts of some layers, whose indices ascend."""
        parts = self._whole.detach().unflatten(self.axis, (self._num_layers, -1))
        kept = parts.index_select(self.axis, torch.tensor(layers, device=parts.device))
        self._put(nn.Parameter(kept.flatten(self.axis, self.axis + 1), self._whole.requires_grad))

    def restore(self) -> None:
        """Keep the parts of all layers again."""
        self._put(self._whole)

    def _put(self, weight: nn.Parameter) -> None:
        setattr(self._module, self._key, weight)
        rows, columns = weight.shape
        if isinstance(self._module, nn.Embedding):
            self._module.embedding_dim = columns
        elif isinstance(self._module, nn.Linear):
            self._module.out_features = rows


def packed_tables(model: nn.Module, layers: DecoderLayers) -> list[PackedTable]:
    """Find the weights beside the layers that hold a part for each of them."""
    prefix, weights = layers.path.rpartition(".")[0], dict(model.named_parameters())
    tables = {".".join(filter(None, (prefix, tail))): axis for tail, axis in PACKED_TABLES.items()}
    return [
        PackedTable(model, name, axis, len(layers))
        for name, axis in tables.items()
        if name in weights and weights[name].shape[axis] % len(layers) == 0
    ]


class AdapterList:
    """A list of adapters for the layers that share the weights beside it, as in Zamba 2."""

    def __init__(self, module: nn.Module, name: str, sharing: Sequence[int]) -> None:
        self._module, self.name, self._sharing = module, name, sharing
        self._whole: nn.ModuleList = getattr(module, name)

    def keep(self, layers: Sequence[int]) -> None:
        """Keep the adapters of some layers, whose indices ascend."""
        kept = [part for i, part in zip(self._sharing, self._whole, strict=True) if i in layers]
        setattr(self._module, self.name, nn.ModuleList(kept))

    def restore(self) -> None:
        """Keep the adapters of all layers again."""
        setattr(self._module, self.name, self._whole)


def adapter_lists(model: nn.Module, layers: DecoderLayers) -> list[AdapterList]:
    """Find the lists of adapters in the layers of a model whose layers share weights."""
    sharing = getattr(text_config(model), "hybrid_layer_ids", ())
    if not sharing:
        return []
    return [
        AdapterList(module, name, sharing)
        for module in layers.modules.modules()
        for name, child in module.named_children()
        if name.endswith("_adapter_list") and len(cast("nn.ModuleList", child)) == len(sharing)
    ]


def layer_parts(model: nn.Module, layers: DecoderLayers) -> list[PackedTable | AdapterList]:
    """Find everything beside the layers' modules that holds a part for every layer."""
    return [*packed_tables(model, layers), *adapter_lists(model, layers)]


def undo_rescaling(model: nn.Module) -> None:
    """Restore weights that RWKV divides in place for inference, by their layer's number."""
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            training, module.training = module.training, True
            cast("Any", module)._rescale_layers()
            module.training = training


def require_weights(model: PreTrainedModel) -> None:
    """Raise ModelError for a model whose weights are neither in memory nor offloaded."""
    if any(p.is_meta for p in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise ModelError(f"the weights of {type(model).__name__} are on the meta device: load them")


def input_device(layers: DecoderLayers) -> torch.device:
    """The device of the first weights, in their forward if offloaded: token ids go there."""
    for module in layers.runner.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
            return execution_device(module) or torch.device("cpu")
    raise ModelError(f"{type(layers.runner).__name__} has no weights")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode, without dropout, inside the ``with`` statement."""
    training = [module for module in model.modules() if module.training]
    if training:  # to switch hundreds of modules takes as long as a small layer does
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def swapped(owner: Any, **values: Any) -> Iterator[None]:
    """Give attributes of an object other values inside the ``with`` statement."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def learned_positions(runner: nn.Module, config: Any) -> int | None:
    """The number of positions that a model has learned; None if it computes them, as by RoPE."""
    count = admitted_length(config)
    tables = [module for module in runner.modules() if isinstance(module, nn.Embedding)]
    sizes = {table.num_embeddings for table in tables} - {config.vocab_size}
    # OPT and its kin keep two rows more, for padding.
    learned = count is not None and any(0 <= size - count <= 2 for size in sizes)
    return count if learned else None


def admitted_length(config: Any) -> int | None:
    """The longest text that a config admits, in tokens, if it says so."""
    count = getattr(config, "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else None
