"""Layers streamed from files: each weight is made as by transformers, when it is needed.

What it joins of stored tensors, as experts, is joined in memory at each read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from threading import RLock, get_ident
from typing import Any, Protocol
from weakref import ref

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from ..errors import ModelError
from .architecture import find_layers
from .offload import places_in

_LOCK = RLock()
"""Transformers' way to load weights is replaced by one thread at a time."""

Place = tuple[str, int, int]
"""A file, the first byte of a tensor in it, and the one behind the last."""


class Rules(Protocol):
    """How weights are made of stored tensors."""

    @property
    def sources(self) -> Mapping[str, list[str]]:
        """By the name of a weight the stored tensors that it is made of."""

    def fits(self, target: str, weight: torch.Tensor) -> bool:
        """Whether stored tensors make a weight of this size."""

    def place(self, name: str) -> Place:
        """Find a stored tensor."""

    def make(self, target: str) -> torch.Tensor:
        """Read and make a weight."""


class LayerWeights(Mapping[str, torch.Tensor]):
    """The weights of a model's layers in files, made anew at every look.

    ``index``: where the tensors of each weight lie; ``state_dict``: changed weights, in front of
    the files.
    """

    def __init__(self) -> None:
        self.index: dict[str, dict[str, list[Place]]] = {}
        self.state_dict: dict[str, torch.Tensor] = {}
        self._rules: Rules

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.index:
            raise KeyError(name)
        return self.state_dict[name] if name in self.state_dict else self._rules.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def take(self, model: PreTrainedModel, rules: Rules) -> set[str]:
        """Take over the weights of a model's layers that rules make; the tensors that they need."""
        self._rules = rules
        for name, weight in layer_parameters(model).items():
            if (sources := rules.sources.get(name)) and rules.fits(name, weight):
                self.index[name] = {"places": list(map(rules.place, sources))}
                setattr(weight, "_is_hf_initialized", True)  # noqa: B010
        return {source for name in self.index for source in rules.sources[name]}


def layer_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters of a model's layers, by their names in the model."""
    path = f"{find_layers(model).path}."
    every = model.named_parameters(remove_duplicate=False)
    return {name: weight for name, weight in every if name.startswith(path)}


class Converted:
    """Weights by transformers' conversions, as ``convert_and_load_state_dict_in_model`` does it.

    ``sources`` are the stored tensors by weight, or by the first of several that are made together.
    """

    def __init__(self, names: Iterable[str], mapping: list[Any], model: PreTrainedModel) -> None:
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}
        self._model = ref(model)
        self._patterns: dict[str, str | None] = {}
        self.sources: dict[str, list[str]] = defaultdict(list)
        empty, prefix = model.state_dict(), model.base_model_prefix
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, empty)
            if target not in empty and name in empty:
                target, pattern = rename_source_key(name, [], [], prefix, empty)
            if target in empty:
                self.sources[target].append(name)
                self._patterns[name] = pattern

    def convert(self, first: str, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make a weight, and those that are made with it, of tensors that are read now."""
        converter: Any = None
        for name in self.sources[first]:
            pattern = self._patterns[name]
            if pattern is None:
                return {first: read(name)}
            converter = self._converters[pattern]
            converter.add_tensor(first, name, pattern, partial(read, name))
        model: Any = self._model()
        made = converter.convert(first, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


class _InSafetensors(Converted):
    """The weights of a model's layers, by conversions of the tensors in files of safetensors.

    ``mismatched`` weights would be of another shape: name, that shape, and what it should be.
    """

    def __init__(self, files: Mapping[str, Any], model: PreTrainedModel, config: Any) -> None:
        self._places = {
            name: (file, *place) for file in files for name, place in places_in(file).items()
        }
        super().__init__(self._places, config.weight_mapping or [], model)
        self.mismatched: set[tuple[str, Any, Any]] = set()
        self._dtypes: dict[str, torch.dtype] = {}
        self._first: dict[str, str] = {}
        self._shapes: dict[str, torch.Size] = {}
        weights = layer_parameters(model)
        for first in weights.keys() & self.sources.keys():
            self._dtypes[first] = _dtype_of(first, weights[first].dtype, config)
            made = self.convert(first, partial(self._empty, files, first))
            for name in weights.keys() & made.keys():
                self._first[name], self._shapes[name] = first, made[name].shape
                weights[name].data = weights[name].data.to(made[name].dtype)
        self._tied: dict[str, str] = {}
        for name, source in model.all_tied_weights_keys.items():
            if name in weights and name not in self._first and source in self._first:
                self._tied[name] = source
                self._first[name], self._shapes[name] = self._first[source], self._shapes[source]
        self.sources = {name: self.sources[first] for name, first in self._first.items()}

    def _empty(self, files: Mapping[str, Any], first: str, name: str) -> torch.Tensor:
        """A stored tensor without values, as a weight needs it."""
        shape = files[self._places[name][0]].get_slice(name).get_shape()
        return torch.empty(shape, dtype=self._dtypes[first], device="meta")

    def fits(self, target: str, weight: torch.Tensor) -> bool:
        """As :class:`Rules`; what does not fit is mismatched."""
        shape = self._shapes[target]
        if shape != weight.shape:
            self.mismatched.add((target, shape, weight.shape))
        return shape == weight.shape

    def place(self, name: str) -> Place:
        """As :class:`Rules`."""
        return self._places[name]

    def make(self, target: str) -> torch.Tensor:
        """Make a weight of files that are opened anew, so that no page of theirs stays mapped."""
        first = self._first[target]
        with ExitStack() as stack:
            opened = cache(lambda file: stack.enter_context(safe_open(file, framework="pt")))

            def read(name: str) -> torch.Tensor:
                stored: torch.Tensor = opened(self._places[name][0]).get_slice(name)[...]
                return stored.to(self._dtypes[first])

            return self.convert(first, read)[self._tied.get(target, target)]

    def others(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """The stored tensors that no weight of a layer is made of, unread."""
        of_layers = {name for sources in self.sources.values() for name in sources}
        return {
            name: files[file].get_slice(name)
            for name, (file, _, _) in self._places.items()
            if name not in of_layers
        }


def _dtype_of(name: str, dtype: torch.dtype, config: Any) -> torch.dtype:
    """The dtype of a weight; that of the model, unless transformers keeps it in another one."""
    if config.dtype_plan:
        found, by_group, _ = build_glob_alternation(list(config.dtype_plan))
        if (match := found.search(name)) and match.lastgroup is not None:
            planned: torch.dtype = config.dtype_plan[by_group[match.lastgroup]]
            return planned
    return dtype


@contextmanager
def layers_on_disk() -> Iterator[LayerWeights]:
    """Let this thread's transformers load a model without its layers, which stay in safetensors."""
    weights, stock, thread = LayerWeights(), PreTrainedModel._load_pretrained_model, get_ident()

    def load(model: Any, state_dict: Any, files: Any, config: Any, *more: Any, **named: Any) -> Any:
        if get_ident() != thread:
            return stock(model, state_dict, files, config, *more, **named)
        if other := next((file for file in files if not file.endswith(".safetensors")), None):
            raise ModelError(
                f"{other} cannot be streamed: expected safetensors, or a GGUF file (device_map, "
                f"--stream)",
                see="streaming",
            )
        with ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
            rules = _InSafetensors(opened, model, config)
            weights.take(model, rules)
            info, _ = stock(model, rules.others(opened), files, config, *more, **named)
        info.missing_keys -= rules.sources.keys()
        info.mismatched_keys |= rules.mismatched
        return info, weights.index

    with _LOCK:
        setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(load))  # noqa: B010
        try:
            yield weights
        finally:
            setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(stock))  # noqa: B010
