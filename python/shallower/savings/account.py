"""The account of a model by its config alone: parameters, bytes, and the operations of a forward.

The model's own forward runs on tensors without values, so no family has a formula. Each product (of
matrices, convolutions, fused attention) counts alone; what lies between two products counts as one
fused kernel. This is what a good implementation does, not what eager torch does.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ModelError
from ..memory.rehearsal import Rehearsal, build_empty, first_that_runs, output_of
from ..memory.weights import num_parameters, stored_bytes, weight_bytes
from ..models.architecture import evaluating, find_layers, learned_positions, text_config
from ..models.dtypes import plain_dtype
from ..values.identity import Keyed

_SUMMED: dict[str, Callable[[Sequence[torch.Tensor]], int]] = {
    "aten::mm": lambda given: given[0].shape[-1],
    "aten::bmm": lambda given: given[0].shape[-1],
    "aten::addmm": lambda given: given[1].shape[-1],
    "aten::baddbmm": lambda given: given[1].shape[-1],
    "aten::convolution": lambda given: prod(given[1].shape[1:]),
    "aten::_grouped_mm": lambda given: given[0].shape[-1],
    "transformers::grouped_mm_fallback": lambda given: given[0].shape[-1],
}
"""Products by their names, each with how many numbers a value of its output is summed of."""

_BY_EXPERT = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
"""Products of every row with the matrix of its expert."""

_PICKING = ("aten::embedding", "aten::index", "aten::index_select", "aten::gather")
"""Operations that read no more of their first input than they give back."""

_COPYING = ("aten::clone", "aten::_to_copy")
"""Operations whose output repeats what their input repeats."""

_UNMOVED = ("aten::_unsafe_view", "aten::detach", "aten::lift_fresh")
"""Operations that move nothing although torch does not call them views."""

_UNWRITTEN = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")
"""Operations that reserve memory and write nothing to it."""


@dataclass(slots=True)
class Operation:
    """A product, or the stretch between two products."""

    flops: int = 0  # 2 for each multiplication and addition; 0 for a stretch
    read: int = 0  # bytes, weights included
    written: int = 0  # bytes
    launches: int = 0  # operations of torch that it is made of
    layer: int | None = None  # its layer; None outside of these


@dataclass(slots=True)
class _Stored:
    """A storage, and what is known of it."""

    storage: torch.UntypedStorage  # kept, so that no other gets its key
    origin: Operation | None  # the stretch that made it, until it is charged for writing
    distinct: int  # bytes of it that are no copies of others
    scale: float = 1.0  # bytes in memory for a byte; below 1 for quantised weights


@dataclass(slots=True)
class _Stretch:
    """An open stretch between two products."""

    operation: Operation
    made: set[int] = field(default_factory=set)
    seen: dict[int, int] = field(default_factory=dict)
    parts: set[tuple[Any, ...]] = field(default_factory=set)


class Recorder(TorchDispatchMode):
    """Records the ``operations`` that run in its body, on weights that may be fake.

    ``scales`` has, by storage, the bytes in memory for a byte of a weight, where they are not as
    many. What is put behind the tensors ``cached`` is taken to be written in place.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scales: Mapping[int, float] | None = None,
        cached: Sequence[torch.Tensor] = (),
    ) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._stored: dict[int, _Stored] = {}
        self._stretch: _Stretch | None = None
        self._layer: int | None = None
        self._weights = {storage_key(weight) for weight in model.parameters()}
        self._cached = {storage_key(value) for value in cached}
        self._scales = scales or {}

    @contextmanager
    def inside(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Record the body, in which operations know which of the layers they are in."""

        def enter(place: int | None) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self._layer, self._stretch = place, None

            return hook

        with ExitStack() as stack:
            for place, layer in enumerate(layers):
                stack.callback(layer.register_forward_pre_hook(enter(place)).remove)
                stack.callback(layer.register_forward_hook(enter(None)).remove)
            stack.enter_context(self)
            stack.enter_context(_FusedAttention(self))
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = output_of(func, args, kwargs or {})
        given = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
        made = [one for one in tree_iter(output) if isinstance(one, torch.Tensor)]
        name = func.name().partition(".")[0]
        if name in _SUMMED:
            flops = 2 * sum(one.numel() for one in made) * _SUMMED[name](given)
            self.product(flops, given, made, by_expert=name in _BY_EXPERT)
        elif made and not (func.is_view or name in _UNMOVED + _UNWRITTEN):
            self._between(name, given, made)
        return output

    def product(
        self,
        flops: int,
        given: Sequence[torch.Tensor],
        made: Sequence[torch.Tensor],
        *,
        by_expert: bool = False,
    ) -> None:
        """Record a product; ``by_expert`` it reads no more experts than there are rows."""
        self._stretch = None
        operation = Operation(flops, launches=1, layer=self._layer)
        self.operations.append(operation)
        for place, value in enumerate(given):
            size = self._read(value)
            if by_expert and place == 1:
                size = size * min(len(value), len(given[0])) // len(value)
            operation.read += size
        for value in made:
            operation.written += value.nbytes
            self._keep(value, None)

    def _between(
        self, name: str, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]
    ) -> None:
        """Record an operation that is no product, as part of the stretch that it is in."""
        keys = [storage_key(value) for value in given]
        if given and name in _PICKING and keys[0] in self._weights:
            self._pick(given[0], made[0])
            return
        if name == "aten::cat" and keys[0] in self._cached:
            self._append(given, made[0])
            return
        if self._stretch is None:
            self._stretch = _Stretch(Operation(layer=self._layer))
            self.operations.append(self._stretch.operation)
        stretch = self._stretch
        stretch.operation.launches += 1
        for place, value in enumerate(given):
            limit = made[0].nbytes if name in _PICKING and place == 0 else None
            self._enter(stretch, value, limit)
        for value in made:
            key = storage_key(value)
            if key not in keys:
                stretch.made.add(key)
                distinct = self._distinct(given[0]) if name in _COPYING and given else None
                self._keep(value, stretch.operation, distinct)
            elif key not in stretch.made:  # in place
                stretch.operation.written += value.nbytes
                stretch.made.add(key)

    def _enter(self, stretch: _Stretch, value: torch.Tensor, limit: int | None) -> None:
        """Charge a stretch for an input that was not made in it, each part of it once."""
        key = storage_key(value)
        part = (key, value.storage_offset(), tuple(value.shape), tuple(value.stride()))
        if key in stretch.made or part in stretch.parts:
            return
        stretch.parts.add(part)
        size = self._read(value)
        if limit is not None:
            size = min(size, limit)
        left = value.untyped_storage().nbytes() - stretch.seen.get(key, 0)
        size = max(0, min(size, left))
        stretch.seen[key] = stretch.seen.get(key, 0) + size
        stretch.operation.read += size

    def _read(self, value: torch.Tensor) -> int:
        """The bytes of a tensor in memory; whatever made it is charged for writing it, once."""
        stored = self._stored.get(storage_key(value))
        if stored is None:
            stored = self._keep(value, None)
        if stored.origin is not None:
            stored.origin.written += stored.distinct
            stored.origin = None
        return round(self._distinct(value) * stored.scale)

    def _distinct(self, value: torch.Tensor) -> int:
        """The bytes of a tensor that are no copies of others of its bytes."""
        stored = self._stored.get(storage_key(value))
        size = value.element_size() * prod(
            length for length, stride in zip(value.shape, value.stride(), strict=True) if stride
        )
        return size if stored is None else min(size, stored.distinct)

    def _keep(
        self, value: torch.Tensor, origin: Operation | None, distinct: int | None = None
    ) -> _Stored:
        storage, key = value.untyped_storage(), storage_key(value)
        whole = storage.nbytes() if origin is None else value.nbytes
        size = whole if distinct is None else min(whole, distinct)
        stored = _Stored(storage, origin, size, self._scales.get(key, 1.0))
        self._stored[key] = stored
        return stored

    def _pick(self, weight: torch.Tensor, picked: torch.Tensor) -> None:
        """Rows of a weight are read where they are used: an embedding, the matrices of experts."""
        stored = self._keep(picked, None)
        stored.distinct = min(picked.nbytes, weight.nbytes)

    def _append(self, given: Sequence[torch.Tensor], longer: torch.Tensor) -> None:
        """New keys or values are written behind those of a cache."""
        operation = Operation(launches=1, layer=self._layer)
        self.operations.append(operation)
        operation.read = sum(self._read(value) for value in given[1:])
        operation.written = sum(value.nbytes for value in given[1:])
        self._keep(longer, None)
        self._stretch = None


class _FusedAttention(TorchFunctionMode):
    """Counts scaled dot-product attention as one product that reads shared keys and the mask once.

    Scores never reach memory; masked products count, as in torch's own counter.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = (named[name] for name in names[:3])
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        mask = named.get("attn_mask")
        given = [query, key, value, *([] if mask is None else [mask])]
        rows = prod(query.shape[:-1])
        flops = 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self._recorder.product(flops, given, [output])
        return output


def storage_key(value: torch.Tensor) -> int:
    """A number of a tensor's storage that no other storage has while this one is alive."""
    return int(value.untyped_storage()._cdata)


_CACHES = ("cache", "past_key_values", "cache_params")
"""Names under which models take and give their cache."""


@dataclass(frozen=True, slots=True)
class Account:
    """What a model holds, and what its forwards compute, read and write."""

    parameters: int  # values of its weights; those that it shares count once
    weight_bytes: int  # bytes of weights and buffers
    cache_bytes: int  # keys, values and other memory of all texts
    cache_growth: int  # bytes of one more token of one text
    prefill: tuple[Operation, ...]  # a forward of the context
    decode: tuple[Operation, ...]  # of one more token of every text
    layer_weights: tuple[int, ...]  # bytes
    layer_caches: tuple[int, ...]  # bytes


def count(config: PretrainedConfig, dtype: str, *, context: int = 2048, batch: int = 1) -> Account:
    """Count what a model holds and does without its weights, once for each config.

    ``context`` are the tokens that each of ``batch`` texts has before it is continued.
    """
    ways = str(config._attn_implementation), str(config._experts_implementation)
    content = config.to_json_string(use_diff=False)
    known = Keyed((type(config), content, *ways), config)
    return _count(known, dtype, context=context, batch=batch)


@lru_cache(maxsize=64)
def _count(known: Keyed[PretrainedConfig], dtype: str, *, context: int, batch: int) -> Account:
    """Count once: a run needs the whole model again beside each of its cuts."""
    config, plain = known.value, plain_dtype(dtype)
    model = build_empty(config, plain)
    _check_positions(model, context)

    def counted(experts: str | None) -> Account:
        built = build_empty(config, plain, experts=experts)
        return _Counting(built, dtype).count(context, batch)

    found = first_that_runs(counted)
    if found is None:
        raise ModelError(
            f"the forward of {type(model).__name__} does not run without weights, so that its "
            f"operations cannot be counted"
        )
    return found


def longest_context(model: PreTrainedModel) -> int:
    """Tokens before a text is continued, one less than the learned positions, or any number."""
    positions = learned_positions(find_layers(model).runner, text_config(model))
    return sys.maxsize if positions is None else positions - 1


def _check_positions(model: PreTrainedModel, context: int) -> None:
    longest = longest_context(model)
    if context > longest:
        raise ModelError(
            f"context = {context}: the model has learned {longest + 1} positions, and one is for "
            f"the next token; ask for fewer (context, --context)"
        )


class _Counting:
    """A model whose weights are replaced by fake ones, on which forwards are recorded."""

    def __init__(self, model: PreTrainedModel, dtype: str) -> None:
        self._model, self._dtype = model, dtype
        self._weights = weight_bytes(model, dtype)
        layers = find_layers(model).modules
        stored = stored_bytes(model, dtype)
        self._of_layers = tuple(
            sum(stored[weight] for weight in layer.parameters())
            + sum(buffer.nbytes for buffer in layer.buffers())
            for layer in layers
        )
        names = {id(weight): name for name, weight in model.named_parameters()}
        shares = {names[id(w)]: size / w.nbytes for w, size in stored.items() if w.nbytes}
        self._rehearsal = Rehearsal(model)
        self._scales = {
            storage_key(weight): shares[name]
            for name, weight in model.named_parameters()
            if shares.get(name, 1.0) != 1.0
        }

    def count(self, context: int, batch: int) -> Account:
        found: list[Account] = []
        self._rehearsal.run(lambda: found.append(self._run(context, batch)), padded=False)
        return found[0]

    def _run(self, context: int, batch: int) -> Account:
        ids = torch.zeros((batch, context), dtype=torch.long)
        takes = inspect.signature(self._model.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            stack.enter_context(torch.no_grad())
            prefill, output = self._recorded(ids, (), last)
            name, cache = cache_of(output)
            held, by_layer = _sizes(cache), self._by_layer(cache)
            decode, _ = self._recorded(ids[:, :1], list(_tensors(cache)), {name: cache})
            growth = _sizes(cache) - held
        return Account(
            num_parameters(self._model),
            self._weights,
            held,
            growth // batch,
            prefill,
            decode,
            self._of_layers,
            by_layer,
        )

    def _recorded(
        self, ids: torch.Tensor, cached: Sequence[torch.Tensor], options: dict[str, Any]
    ) -> tuple[tuple[Operation, ...], Any]:
        recorder = Recorder(self._model, scales=self._scales, cached=cached)
        with recorder.inside(list(find_layers(self._model).modules)):
            output = self._model(input_ids=ids, use_cache=True, **options)
        return tuple(recorder.operations), output

    def _by_layer(self, cache: Any) -> tuple[int, ...]:
        """The bytes of every layer's cache; of layers that share theirs a mean."""
        count = len(self._of_layers)
        layers = getattr(cache, "layers", ())
        if len(layers) == count:
            return tuple(sum(value.nbytes for value in _in(layer)) for layer in layers)
        return (_sizes(cache) // count,) * count


def cache_of(output: Any) -> tuple[str, Any]:
    """Find the cache in a model's output, and the name by which its forward takes it."""
    for name in _CACHES:
        if output.get(name) is not None:
            return name, output[name]
    raise ModelError("the model gives no cache of keys and values")


def _in(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors of one layer of a cache; counters of tokens are none."""
    for value in tree_iter(list(vars(layer).values())):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value


def _tensors(cache: Any) -> Iterator[torch.Tensor]:
    for layer in getattr(cache, "layers", None) or [cache]:
        yield from _in(layer)


def _sizes(cache: Any) -> int:
    return sum(value.nbytes for value in _tensors(cache))
