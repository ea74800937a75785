"""What every expert of a model does to the tokens that it is sent, seen while the model runs.

Hooks on the modules that hold a layer's experts are given the states, the experts that the router
has chosen, and their weights. So nothing of a router is computed again. The outputs of single
experts are computed by the same module, for one expert a token with a weight of one. So no family's
experts are written a second time. The model's own forward, and so its states, are as without the
hooks. It takes the time of the experts twice.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import ModelError
from ..models.decoder import Decoder
from ..models.experts import RoutedExperts, find_experts, routing_of
from ..texts.batches import Batch
from .statistics import ExpertStatistics, pair_places

ENOUGH = 1 << 22
"""Values of float64 that are made at once."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Tokens and the experts that they were sent to, k each."""

    experts: torch.Tensor  # (n, k) int64; an index that no expert has is for none
    gates: torch.Tensor  # (n, k), what multiplies the outputs or the inputs
    norms: torch.Tensor  # (n, k) float64, of the outputs
    turned: torch.Tensor  # (n,) float64, 1 - cosine of the stream before and behind all experts
    multiplies: bool  # whether the gates multiply the outputs
    products: torch.Tensor | None = None  # (n, k, k) float64, inner, of what experts add

    def pairs(
        self, rows: NDArray[np.int64], num_texts: int, num_experts: int
    ) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Sums by text and pair of experts: (B, P) tokens, and (B, P, 1) products."""
        if self.products is None:
            return None
        experts, products = self.experts.cpu().numpy(), self.products.cpu().numpy()
        first, second = np.triu_indices(experts.shape[1])
        one, other = experts[:, first], experts[:, second]
        there = (np.minimum(one, other) >= 0) & (np.maximum(one, other) < num_experts)
        num_pairs = num_experts * (num_experts + 1) // 2
        places = rows[:, None] * num_pairs + pair_places(one, other, num_experts)
        cells, size = places[there], num_texts * num_pairs
        counts = np.bincount(cells, minlength=size).reshape(num_texts, num_pairs)
        values = np.bincount(cells, products[:, first, second][there], size)
        return counts, values.reshape(num_texts, num_pairs, 1)

    def sums(
        self, rows: NDArray[np.int64], num_texts: int, num_experts: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Sums by text and expert: (B, E) tokens, and (B, E, 6) values in the tokens' order."""
        experts = self.experts.cpu().numpy()
        there = (experts >= 0) & (experts < num_experts)
        cells = (rows[:, None] * num_experts + experts)[there]
        gates, norms = self.gates.double().cpu().numpy(), self.norms.cpu().numpy()
        gated = gates * norms if self.multiplies else norms
        moved = self.turned.cpu().numpy()[:, None] * gated
        size = num_texts * num_experts
        values = [
            np.bincount(cells, value[there], size)
            for value in (gates, norms, norms**2, gated, gated**2, moved)
        ]
        counts = np.bincount(cells, minlength=size).reshape(num_texts, num_experts)
        return counts, np.stack(values, -1).reshape(num_texts, num_experts, -1)


class ExpertHooks:
    """Hooks on the experts of a model that gather their statistics in a body.

    A forward counts once it is through: its batch is named by :meth:`watching`, or by
    :meth:`turn_to` for the layers that run until the next call.
    """

    def __init__(self, model: nn.Module | Decoder) -> None:
        decoder = Decoder.of(model)
        found = find_experts(decoder.model, decoder.layers)
        routing = routing_of(decoder.model, found[0].num_experts)
        self.statistics = ExpertStatistics([one.layer for one in found], routing)
        modules = decoder.layers.modules
        self._layers = [
            _Layer(self, place, one=one, layer=modules[one.layer])
            for place, one in enumerate(found)
        ]
        self._at = {one.layer: layer for one, layer in zip(found, self._layers, strict=True)}
        self._batch: Batch | None = None
        self._found: dict[int, Sent] = {}
        self._handles: list[Any] = []
        self._real: dict[torch.device, torch.Tensor] = {}

    def __enter__(self) -> "ExpertHooks":
        for layer in self._layers:
            self._handles += layer.hook()
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._forget()

    @property
    def is_watching(self) -> bool:
        """Whether what runs now is of a batch that counts."""
        return self._batch is not None

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Count a forward of all layers, if it comes to its end."""
        self.turn_to(batch)
        try:
            yield
            if missing := [one.layer for one in self._layers if one.place not in self._found]:
                raise ModelError(f"the forward did not call the experts of the layers {missing}")
            self.turn_to(None)
        finally:
            self._forget()

    def turn_to(self, batch: Batch | None) -> None:
        """Count what has run since the last call, and continue with a batch or with none."""
        if self._batch is not None:
            rows = np.nonzero(self._batch.attention_mask)[0]
            experts = self.statistics.routing.num_experts
            for place, sent in self._found.items():
                of = rows, len(self._batch), experts
                self.statistics.add(place, *sent.sums(*of), pairs=sent.pairs(*of))
        self._forget()
        self._batch = batch

    def check_stream(self, behind: int, states: torch.Tensor) -> None:
        """Compare the states behind a layer with what a plain residual stream would be."""
        if behind in self._at:
            self._at[behind].check_stream(states)

    def tokens(self, given: torch.Tensor, path: str) -> torch.Tensor:
        """The places of the tokens that are no padding among all of (B T, D) states."""
        assert self._batch is not None
        mask = self._batch.attention_mask
        if given.shape[0] != mask.size:
            raise ModelError(
                f"{path} was given {given.shape[0]} tokens of a batch of {mask.size}: the "
                f"experts of this model cannot be observed"
            )
        if given.device not in self._real:
            self._real[given.device] = torch.from_numpy(np.flatnonzero(mask)).to(given.device)
        return self._real[given.device]

    def take(self, place: int, sent: Sent) -> None:
        """Keep what a layer did; what it did before in the same forward is forgotten."""
        self._found[place] = sent

    def _forget(self) -> None:
        self._batch, self._found, self._real = None, {}, {}
        for layer in self._layers:
            layer.forget()


class _Layer:
    """The hooks of one layer: on its experts, and on the stream before them."""

    def __init__(
        self, hooks: ExpertHooks, place: int, *, one: RoutedExperts, layer: nn.Module
    ) -> None:
        self.place, self.layer = place, one.layer
        self._hooks, self._one, self._module = hooks, one, layer
        self._is_checked = False
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._scores: torch.Tensor | None = None
        self._before: torch.Tensor | None = None
        self._wanted: torch.Tensor | None = None

    def hook(self) -> list[Any]:
        """Add the hooks, and give what removes them."""
        name = self._one.path.split(".")[0]
        block = self._module.get_submodule(name)
        handles = [
            part.register_forward_hook(self._after_part)
            for other, part in self._module.named_children()
            if other != name
        ]
        if self._one.block:
            around = self._module.get_submodule(self._one.block)
            handles += [
                part.register_forward_hook(self._after_router)
                for part in around.children()
                if part is not self._one.module
            ]
        experts = self._one.module.register_forward_hook(self._after_experts, with_kwargs=True)
        return [
            *handles,
            block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            experts,
            block.register_forward_hook(self._after_block),
            self._module.register_forward_hook(self._after_layer),
        ]

    def forget(self) -> None:
        """Let tensors go, but what the states behind the layer are compared with."""
        self._parts, self._scores, self._before = [], None, None

    def check_stream(self, states: torch.Tensor) -> None:
        """Learn whether the states behind the layer are those before its block plus its output."""
        wanted, self._wanted = self._wanted, None
        if wanted is None or self._is_checked:
            return
        self._is_checked = True
        if wanted.shape != states.shape or not torch.equal(wanted, states.to(wanted.device)):
            self._hooks.statistics.lose_stream()

    def _after_part(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._hooks.is_watching and args and isinstance(output, torch.Tensor):
            self._parts.append((args[0], output))

    def _after_router(self, _: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        scores = output[0] if isinstance(output, tuple) else output
        if isinstance(scores, torch.Tensor) and scores.shape[-1] == self._one.num_experts:
            self._scores = scores

    def _before_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        before = (entered for entered, left in self._parts if left is given)
        self._before, self._parts = next(before, None), []

    def _after_block(self, _: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        before = self._before
        if self._is_checked or self._wanted is not None or before is None:
            return
        if before.numel() == made.numel() and self._hooks.is_watching:
            self._wanted = before + made.reshape(before.shape)

    def _after_layer(self, _: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self.check_stream(output[0] if isinstance(output, tuple) else output)
        self.forget()

    def _after_experts(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._hooks.is_watching:
            return
        if np.isnan(self._hooks.statistics.aimer[self.place]).any():
            self._hooks.statistics.aimer[self.place] = weight_ratios(module, self._one.num_experts)
        given = [*args, *kwargs.values()]
        if len(given) == 3 and given[1].shape == given[2].shape:
            self._hooks.take(self.place, self._of_outputs(module, given, output))
        elif len(given) == 1 and self._scores is not None:
            self._hooks.take(self.place, self._of_inputs(given[0], output))
        else:
            raise ModelError(
                f"layer {self.layer}: {type(module).__name__} is not called with states, the "
                f"chosen experts and their weights: its experts cannot be observed"
            )

    def _of_outputs(self, module: nn.Module, given: list[torch.Tensor], output: Any) -> Sent:
        """What experts do whose outputs are multiplied by their weights."""
        states, chosen, weights = (one.reshape(-1, one.shape[-1]) for one in given)
        tokens = self._hooks.tokens(states, self._one.path)
        chosen, gates = chosen.index_select(0, tokens), weights.index_select(0, tokens)
        each = states.index_select(0, tokens).repeat_interleave(chosen.shape[1], 0)
        if given[0].ndim > 2:  # DBRX's are given (B, T, D)
            each = each[None]
        alone = module.forward(each, chosen.reshape(-1, 1), torch.ones_like(gates).reshape(-1, 1))
        alone = alone.reshape(*chosen.shape, -1)
        turned, products = self._turned(tokens, output), self._products(alone, gates)
        return Sent(chosen, gates, _norms(alone), turned, True, products)

    def _of_inputs(self, given: torch.Tensor, output: torch.Tensor) -> Sent:
        """What experts do whose inputs are: all of them run on all tokens, most on zeros."""
        experts = self._one.num_experts
        assert self._scores is not None
        scores = self._scores.reshape(-1, experts)
        by_expert = output.view(experts, -1, output.shape[-1])
        tokens = self._hooks.tokens(by_expert[0], self._one.path)
        gates, chosen = scores.index_select(0, tokens).topk(self._hooks.statistics.routing.chosen)
        alone = by_expert[chosen, tokens[:, None]]
        turned, products = self._turned(tokens, by_expert.sum(0)), self._products(alone)
        chosen = torch.where(gates > 0, chosen, experts)
        return Sent(chosen, gates, _norms(alone), turned, False, products)

    def _products(
        self, alone: torch.Tensor, gates: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The inner products, (n, k, k), of (n, k, D) outputs times gates, if they are kept."""
        if self._hooks.statistics.pairs is None:
            return None
        size = max(1, ENOUGH // alone[:1].numel())
        products = [part.double() @ part.double().mT for part in alone.split(size)]
        if gates is None:
            return torch.cat(products)
        return torch.cat(products) * gates.double()[:, :, None] * gates.double()[:, None, :]

    def _turned(self, tokens: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
        """1 - cosine of the stream before and behind routed experts, (n,) float64; 0 if unknown."""
        routed = routed.reshape(-1, routed.shape[-1])
        statistics, before = self._hooks.statistics, self._before
        is_found = before is not None and before.shape[-1] == routed.shape[-1]
        if statistics.has_stream and not is_found:
            statistics.lose_stream()
        if before is None or not statistics.has_stream:
            return torch.zeros(len(tokens), dtype=torch.float64)
        before = before.flatten(0, -2)
        found = []
        for some in tokens.split(max(1, ENOUGH // before.shape[-1])):
            entered = before.index_select(0, some).double()
            left = entered + routed.index_select(0, some).double()
            found.append(1 - torch.cosine_similarity(entered, left, dim=-1))
        return torch.cat(found).clamp(min=0)


def _norms(states: torch.Tensor) -> torch.Tensor:
    """The norms of (n, k, D) states, (n, k) float64."""
    parts = states.split(max(1, ENOUGH // states[:1].numel()))
    return torch.cat([torch.linalg.vector_norm(part.double(), dim=-1) for part in parts])


def weight_ratios(module: nn.Module, num_experts: int) -> NDArray[np.float64]:
    """The mean of the magnitudes of each expert's weights over their root mean square, (E,).

    Biases aside. 1, the most there is, for an expert of zeros alone or with NaN or infinity; NaN
    where weights are not in memory, or not in a plain dtype.
    """
    stacks = [
        weight.detach().unflatten(0, (num_experts, -1))
        for name, weight in module.named_parameters()
        if "bias" not in name and weight.ndim > 1 and weight.shape[0] % num_experts == 0
    ]
    ratios = np.full(num_experts, np.nan)
    if not stacks or any(one.is_meta or not one.is_floating_point() for one in stacks):
        return ratios
    count = sum(stack[0].numel() for stack in stacks)
    for expert in range(num_experts):
        magnitudes, length = (
            [float(torch.linalg.vector_norm(s[expert], p, dtype=torch.float64)) for s in stacks]
            for p in (1, 2)
        )
        ratio = sum(magnitudes) / (math.hypot(*length) * count**0.5 or math.nan)
        ratios[expert] = min(1.0, ratio)  # which is 1 for a ratio of NaN
    return ratios
