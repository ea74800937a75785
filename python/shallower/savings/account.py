"""The account of a model by its config alone: parameters, bytes, and the operations of a forward.

The model is built without weights, and its own forward runs on tensors that have shapes alone: so
tied embeddings, experts, shared keys and layers of several kinds count as what they are.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_iter
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ModelError
from ..memory.rehearsal import Rehearsal, build_empty, first_that_runs
from ..memory.sizes import num_parameters, stored_bytes, weight_bytes
from ..models.architecture import evaluating, find_layers, text_config
from ..models.learned_positions import learned_positions
from .operations import Operation, Recorder, storage_key

_CACHES = ("cache", "past_key_values", "cache_params")
"""Names under which models take and give their cache."""


@dataclass(frozen=True, slots=True)
class Account:
    """What a model holds, and what its forwards compute, read and write.

    Attributes:
        parameters: values of its weights; those that it shares count once.
        weight_bytes: bytes of its weights and buffers.
        cache_bytes: bytes of keys and values (and of what else a layer remembers) of all texts.
        cache_growth: bytes of them that one more token of one text adds.
        prefill: the operations of a forward of the context.
        decode: those of a forward of one more token of every text.
        layer_weights: bytes of the weights of every decoder layer.
        layer_caches: bytes of the cache of every decoder layer.
    """

    parameters: int
    weight_bytes: int
    cache_bytes: int
    cache_growth: int
    prefill: tuple[Operation, ...]
    decode: tuple[Operation, ...]
    layer_weights: tuple[int, ...]
    layer_caches: tuple[int, ...]


def count(config: PretrainedConfig, dtype: str, *, context: int = 2048, batch: int = 1) -> Account:
    """Count what a model holds and does, without its weights.

    Args:
        config: of transformers.
        dtype: dtype of the weights: ``float32``, ``bfloat16``, ``float16``, ``nf4`` or ``int8``.
        context: tokens that a text has before it is continued.
        batch: texts in a forward.

    Returns:
        The account.

    Raises:
        ModelError: no causal language model can be built from the config, its forward needs
            weights, or it has learned fewer positions than are asked for.
    """
    ways = str(config._attn_implementation), str(config._experts_implementation)
    words = config.to_json_string(use_diff=False)
    return _count(_Asked((type(config), words, *ways), dtype, context, batch, config))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is counted: the words of the config, and the config that they are of."""

    words: tuple[type, str, str, str]
    dtype: str
    context: int
    batch: int
    config: PretrainedConfig = field(compare=False)


@lru_cache(maxsize=64)
def _count(asked: _Asked) -> Account:
    """Count once: a run asks for the whole model again beside each of its cuts."""
    config, dtype, context = asked.config, asked.dtype, asked.context
    plain = torch.bfloat16 if dtype in ("nf4", "int8") else getattr(torch, dtype)
    model = build_empty(config, plain)
    _check_positions(model, context)

    def counted(experts: str | None) -> Account:
        built = build_empty(config, plain, experts=experts)
        return _Counting(built, dtype).count(context, asked.batch)

    found = first_that_runs(counted)
    if found is None:
        raise ModelError(
            f"the forward of {type(model).__name__} does not run without weights, so that its "
            f"operations cannot be counted"
        )
    return found


def longest_context(model: PreTrainedModel) -> int:
    """Tell how many tokens a text may have before it is continued.

    Args:
        model: of any device, also the meta device.

    Returns:
        One less than the positions that the model has learned; of one that computes them, as by
        RoPE, the largest of all numbers here.
    """
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
            num_parameters(self._model), self._weights, held, growth // batch, prefill, decode,
            self._of_layers, by_layer,
        )  # fmt: skip

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
            return tuple(sum(map(_nbytes, _in(layer))) for layer in layers)
        return (_sizes(cache) // count,) * count


def cache_of(output: Any) -> tuple[str, Any]:
    """Find the cache that a model gives.

    Args:
        output: of its forward.

    Returns:
        The name by which the forward takes it, and the cache.

    Raises:
        ModelError: there is none.
    """
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
    return sum(map(_nbytes, _tensors(cache)))


def _nbytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
