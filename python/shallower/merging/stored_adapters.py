"""Adapters of peft by the stored weights that they change, which may be named and split otherwise.

Transformers' own conversion runs backwards on valueless proxies, which track rows and columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from ..cutting.rewriting import StoredCheckpoint
from ..errors import ModelError
from ..models.loading import empty_model
from .adapter_config import CONFIG_FILE, read_adapter_config
from .in_memory import reading, with_adapters
from .low_rank import DTYPES, LowRank

WEIGHTS_FILE = "adapter_model.safetensors"

_CHANGES_OF_PREFIX: Any = getattr(core_model_loading, "PrefixChange", ())
"""Conversions that transformers has since 5.6."""


def low_rank_changes(
    stored: StoredCheckpoint, adapters: Path, *, trust_remote_code: bool = False
) -> Mapping[str, LowRank] | None:
    """Find what adapters add to every stored weight of a checkpoint, by the stored names.

    None if a weight is not stored under a name and in a shape that is known here.
    """
    read_adapter_config(adapters)
    empty = empty_model(stored.folder, trust_remote_code)
    ways = _ways(empty)
    model = empty_model(stored.folder, trust_remote_code).float()
    changes: dict[str, LowRank] = {}
    path = adapters / WEIGHTS_FILE
    peft_model = with_adapters(model, adapters, low_cpu_mem_usage=True, torch_device="cpu")
    with reading(adapters):
        opened = safe_open(path, framework="pt")
    with opened as file:
        left_over = set(file.keys())
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for prefix, layer in _layers(peft_model):
            read = partial(_factor, path, file, left_over)
            left, right, scaling = _factors(prefix, layer, read)
            parameter = _parameter(layer)
            name = names[id(parameter)].replace(".base_layer", "")
            named = _renamed(name, WeightProxy.of(parameter.shape), model=empty, ways=ways)
            pieces = next((one for one in named if _fit(stored, one)), None)
            if pieces is None:
                return None
            if both := set(pieces) & set(changes):
                raise ModelError(f"two adapters in {adapters} change {min(both)}")
            for name, piece in pieces.items():
                dtype = DTYPES[stored.tensors[name].dtype]
                changes[name] = LowRank(name, *piece.of_product(left, right), scaling, dtype)
        if left_over:
            name = min(left_over)
            raise ModelError(f"the adapters in {adapters} hold {name}, of no weight of theirs")
    return changes


def _factor(
    path: Path, file: Any, left_over: set[str], *, name: str, shape: Sequence[int]
) -> torch.Tensor:
    """Read a small matrix of adapters, which is left over no more."""
    if name not in left_over:
        raise ModelError(f"{path} lacks {name}")
    left_over.discard(name)
    tensor: torch.Tensor = file.get_tensor(name)
    if tensor.shape != torch.Size(shape):
        raise ModelError(
            f"{name} in {path} is of shape {tuple(tensor.shape)}: expected {tuple(shape)}, by the "
            f"rank in {CONFIG_FILE} and the model"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"{name} in {path} holds NaN or infinity: train it again")
    return tensor.float()


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The adapted modules of peft's model, and the names that their adapters are saved by."""
    from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module, Linear | ParamWrapper) or module.lora_variant:
            raise ModelError(f"cannot merge adapters on {name}: expected plain ones on linear maps")
        yield name, module


def _parameter(layer: Any) -> Any:
    name = getattr(layer, "parameter_name", None)
    return layer.get_param() if name else layer.get_base_layer().weight


def _factors(
    prefix: str, layer: Any, read: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(E, M, rank) and (E, rank, N) whose product, times the last, is added to a weight."""
    a, b = (
        read(name=f"{prefix}.{name}.weight", shape=getattr(layer, name)["default"].weight.shape)
        for name in ("lora_A", "lora_B")
    )
    scaling = float(layer.scaling["default"])
    if _parameter(layer).ndim == 3:
        layer.lora_A["default"].weight = torch.nn.Parameter(a, requires_grad=False)
        layer.lora_B["default"].weight = torch.nn.Parameter(b, requires_grad=False)
        left, right, scaling = layer.get_delta_factors("default")
        return left.detach(), right.detach(), float(scaling)
    if getattr(layer, "fan_in_fan_out", False):  # GPT-2 keeps its matrices as (in, out)
        return a.T[None], b.T[None], scaling
    return b[None], a[None], scaling


def _ways(model: Any) -> list[list[Any]]:
    """The conversions by which weights may be stored: plain ones, and all."""
    every = get_model_conversion_mapping(model, add_legacy=False)
    plain = [one for one in every if not isinstance(one, _CHANGES_OF_PREFIX)]
    return [plain] if len(plain) == len(every) else [plain, every]


def _renamed(
    name: str, whole: "WeightProxy", *, model: Any, ways: Sequence[list[Any]]
) -> Iterator[dict[str, "WeightProxy"]]:
    """The stored tensors that may make up a weight, as parts of it by name.

    Also with or without the prefix of the model below its head.
    """
    prefix = f"{model.base_model_prefix}."
    for pieces in _candidates(name, whole, model=model, ways=ways):
        yield pieces
        yield {key.removeprefix(prefix): piece for key, piece in pieces.items()}
        yield {prefix + key: piece for key, piece in pieces.items()}


def _candidates(
    name: str, whole: "WeightProxy", *, model: Any, ways: Sequence[list[Any]]
) -> Iterator[dict[str, "WeightProxy"]]:
    for way in ways:
        model._weight_conversions = way
        try:
            yield revert_weight_conversion(model, {name: cast("torch.Tensor", whole)})
        except (AttributeError, TypeError, ValueError, NotImplementedError):
            continue  # an operation that a proxy does not know
    yield {name: whole}


def _fit(stored: StoredCheckpoint, pieces: Mapping[str, "WeightProxy"]) -> bool:
    """Whether tensors of these names and shapes are stored, in dtypes that are merged into."""
    found = [(stored.tensors.get(name), piece) for name, piece in pieces.items()]
    return all(
        tensor is not None
        and tensor.dtype in DTYPES
        and tensor.shape == list(piece.shape)
        and piece.is_matrix
        for tensor, piece in found
    )


_OPERATIONS = ("chunk", "split", "transpose")


class WeightProxy:
    """A weight without values, for the operations that split, transpose and rename it.

    ``axes`` are, for each axis, the axis of the whole weight and the indices there; ``fixed`` the
    index on every axis of the weight that is gone.
    """

    def __init__(
        self, axes: Sequence[tuple[int, NDArray[np.int64]]], fixed: Mapping[int, int]
    ) -> None:
        self._axes, self._fixed = list(axes), dict(fixed)

    @classmethod
    def of(cls, shape: Sequence[int]) -> "WeightProxy":
        """The proxy of a whole weight, (M, N) or, stacked by expert, (E, M, N)."""
        first = 3 - len(shape)
        axes = [(first + k, np.arange(size)) for k, size in enumerate(shape)]
        return cls(axes, {0: 0} if first else {})

    @classmethod
    def __torch_function__(
        cls, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ not in _OPERATIONS:
            raise NotImplementedError(f"{func.__name__} of a proxy")
        return getattr(args[0], func.__name__)(*args[1:], **(kwargs or {}))

    @property
    def shape(self) -> torch.Size:
        """Its axes."""
        return torch.Size(len(indices) for _, indices in self._axes)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self._axes)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or a stack of experts' ones with the experts first."""
        order = [axis for axis, _ in self._axes]
        return [axis for axis in order if axis] in ([1, 2], [2, 1]) and 0 not in order[1:]

    def size(self, dim: int) -> int:
        """The length of an axis."""
        return self.shape[dim]

    def contiguous(self) -> "WeightProxy":
        """Itself: it holds no values."""
        return self

    def squeeze(self, dim: int | None = None) -> "WeightProxy":
        """Remove an axis of length one, or all that there are."""
        gone = [
            k for k in range(self.ndim) if self.size(k) == 1 and dim in (None, k, k - self.ndim)
        ]
        axes = [one for k, one in enumerate(self._axes) if k not in gone]
        fixed = {axis: int(indices[0]) for axis, indices in (self._axes[k] for k in gone)}
        return WeightProxy(axes, {**self._fixed, **fixed})

    def transpose(self, dim0: int, dim1: int) -> "WeightProxy":
        """Swap two axes."""
        axes = list(self._axes)
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
        return WeightProxy(axes, self._fixed)

    def split(self, split_size: Sequence[int] | int, dim: int = 0) -> tuple["WeightProxy", ...]:
        """Split an axis into parts of these sizes, or of one size."""
        length = self.size(dim)
        if isinstance(split_size, int):
            edges = list(range(split_size, length, split_size))
        else:
            edges = list(np.cumsum(split_size))[:-1]
        axis, indices = self._axes[dim]
        parts = []
        for part in np.split(indices, edges):
            axes = list(self._axes)
            axes[dim] = axis, part
            parts.append(WeightProxy(axes, self._fixed))
        return tuple(parts)

    def chunk(self, chunks: int, dim: int = 0) -> tuple["WeightProxy", ...]:
        """Split an axis into so many parts, as torch does."""
        return self.split(-(-self.size(dim) // chunks), dim)

    def of_product(
        self, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the factors (E, M, rank) and (E, rank, N) of a whole weight, those of this part."""
        chosen = {axis: np.array([index]) for axis, index in self._fixed.items()}
        chosen |= dict(self._axes)
        left = _take(_take(left, 0, chosen[0]), 1, chosen[1])
        right = _take(_take(right, 0, chosen[0]), 2, chosen[2])
        if [axis for axis, _ in self._axes if axis] == [2, 1]:
            return right.mT, left.mT
        return left, right


def _take(tensor: torch.Tensor, dim: int, indices: NDArray[np.int64]) -> torch.Tensor:
    """Some of the indices of an axis; a view where they are neighbours."""
    start, count = int(indices[0]), len(indices)
    if np.array_equal(indices, np.arange(start, start + count)):
        return tensor.narrow(dim, start, count)
    return tensor.index_select(dim, torch.from_numpy(indices))
