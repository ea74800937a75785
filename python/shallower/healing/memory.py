"""The memory of a healing: rehearsed without weights, and the batch that is chosen by it."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from ..errors import ModelError, RecipeError
from ..memory.device import Room
from ..memory.plan import Choice, plainly_fits, plan_step
from ..memory.rehearsal import Rehearsal, build_empty, first_that_runs
from ..memory.weights import dequantised_bytes, weight_parts
from ..models.decoder import Decoder
from ..models.dtypes import computing
from ..models.experts import unquantised
from ..models.feed_forward import feed_forward_targets
from ..models.head import Head
from ..models.layer_config import heads_of
from ..models.loading import layers_of
from ..settings.recipe import GLOBAL_BATCH, Resolved
from ..values.estimates import EXPERTS, MemoryPlan, format_size, needed_device, usable
from .losses import TrainingLoss, teach
from .training import add_adapters, recompute_activations

MOST_KEPT, MOST_RECOMPUTED = 4, 8
"""Texts in one forward at most, without recomputation and with it."""

_ADAPTER_BYTES = 4 * 4
"""A trained parameter in float32, its gradient, and two moments of Adam."""

PARTS = ("adapters and optimiser", "activations and loss")


class HealingStep:
    """One forward and backward of a healing, on a cut without weights, beside a teacher if any."""

    def __init__(
        self,
        config: PretrainedConfig,
        recipe: Resolved,
        *,
        uncut_layers: int = 0,
        experts: str | None = None,
    ) -> None:
        dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        model = build_empty(config, dtype, experts=experts)
        targets = feed_forward_targets(model, recipe.attention)
        self.recipe = recipe.without_dropout() if targets.parameters else recipe
        self.weights = weight_parts(model, recipe.dtype)
        layers = layers_of(config) or 1
        whole = sum(self.weights.values()) * max(layers, uncut_layers) // layers
        self._teacher = {"uncut model": whole} if recipe.has_teacher else {}
        self._dequantised = dequantised_bytes(model, recipe.dtype)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            adapted = add_adapters(model, targets, self.recipe, base="")
        trained = [p for p in adapted.parameters() if p.requires_grad]
        self.adapters = sum(p.numel() for p in trained) * _ADAPTER_BYTES
        self._model, self._adapted = model, adapted.train()
        self._rehearsal = Rehearsal(adapted)
        self._seen: dict[tuple[int, bool], int] = {}

    def parts(self, texts: int, recompute: bool | None) -> dict[str, int]:
        """Count the bytes as ``memory.plan.Parts``."""
        key = texts, bool(recompute)
        if key not in self._seen:
            self._seen[key] = self.run(*key)
        own = zip(PARTS, (self.adapters, self._seen[key] + self._dequantised), strict=True)
        return {**self.weights, **dict(own), **self._teacher}

    def run(self, texts: int, recompute: bool) -> int:
        """Rehearse the step, and give the bytes at its peak beside weights and adapters."""
        recompute_activations(self._model, recompute)

        def step() -> None:
            ids = torch.zeros((texts, self.recipe.max_length), dtype=torch.long)
            mask, lesson = torch.ones_like(ids), None
            with computing(self.recipe, ids.device):
                if self.recipe.has_teacher:
                    lesson = teach(Head.of(Decoder.of(self._model)), ids, mask)  # of its own kind
                made = TrainingLoss(self._model)
                with made.made_inside(ids, ids.numel(), lesson):
                    outputs = self._adapted(input_ids=ids, attention_mask=mask, use_cache=False)
                loss = made.of(outputs, ids, ids.numel())
            loss.backward()
            for parameter in self._adapted.parameters():
                parameter.grad = None

        return self._rehearsal.run(step, padded=self.recipe.is_padded)


def plan_healing(
    config: PretrainedConfig,
    recipe: Resolved,
    *,
    room: Room,
    batch_size: int | None = None,
    recompute: bool | None = None,
    processes: int = 1,
    uncut_layers: int = 0,
) -> MemoryPlan:
    """Choose the texts of a forward and recomputation by what a device has room for.

    ``batch_size`` and ``recompute`` are those that are given; the recipe's own are not looked at.
    ``processes`` share a step. On a GPU recomputation is better than swapping.
    """
    choices = list(_choices(batch_size, recompute, processes, room.card))
    step = _step_of(config, recipe, uncut_layers, recompute is True)
    return plan_step(None if step is None else step.parts, choices, room.size)


_LAST: dict[tuple[str, Resolved, int], HealingStep | None] = {}
"""The step that was rehearsed last: a healing is planned for the user, and again when it begins."""


def _step_of(
    config: PretrainedConfig, recipe: Resolved, uncut_layers: int, recompute: bool
) -> HealingStep | None:
    """The step of a healing, rehearsed once; None where the model cannot be."""

    def rehearsed(experts: str | None) -> HealingStep:
        step = HealingStep(config, recipe, uncut_layers=uncut_layers, experts=experts)
        step.parts(1, recompute)
        return step

    key = repr(config.to_dict()), replace(recipe, batch_size=1, recompute=False), uncut_layers
    if key not in _LAST:
        found = first_that_runs(rehearsed)
        _LAST.clear()
        _LAST[key] = found
    return _LAST[key]


def _choices(
    batch_size: int | None, recompute: bool | None, processes: int, card: bool
) -> Iterator[Choice]:
    """Batches and recomputation from the fastest on; the last needs least."""
    share = GLOBAL_BATCH // processes
    for recomputed in (False, True) if recompute is None else (recompute,):
        most = MOST_RECOMPUTED if recomputed and card else MOST_KEPT
        for texts in (8, 4, 2, 1) if batch_size is None else (batch_size,):
            if batch_size is not None or (texts <= most and share % texts == 0):
                yield texts, recomputed


def require_room(plan: MemoryPlan, recipe: Resolved) -> None:
    """Refuse a healing that no choice makes fit, by a RecipeError that says what would."""
    if plan.fits or plan.peak_bytes is None:
        return
    fixed = plan.peak_bytes - plan.parts[PARTS[-1]]
    share = (usable(plan.device_bytes) - fixed) / (plan.peak_bytes - fixed)
    length = int(share * recipe.max_length) // 64 * 64
    needed = f"{format_size(needed_device(plan.peak_bytes))} at least"
    shorter = f"shorten sequences to {length} tokens (max_length, --max-length)"
    others = [shorter] if length >= 64 else []
    experts = plan.parts.get(EXPERTS, 0)
    if recipe.dtype != "nf4":
        but = f", all but {format_size(experts)} of routed experts" if experts else ""
        others.append(f"quantise the weights (dtype, --dtype nf4){but}")
    elif experts:
        needed += f"; {unquantised(recipe.dtype, experts)}"
    raise RecipeError(
        f"healing on sequences of {recipe.max_length} tokens takes a device of {needed}, and there "
        f"are {format_size(plan.device_bytes)}: {' or '.join([*others, 'take a larger one'])}"
    )


def is_small(config: PretrainedConfig, recipe: Resolved, device_bytes: int) -> bool:
    """Show quickly that a healing fits, whatever its family does, as :func:`plainly_fits`."""
    try:
        model = build_empty(config, torch.bfloat16)
    except ModelError:
        return False
    heads = heads_of(config.get_text_config(decoder=True))
    return plainly_fits(
        widths=sum(sum(weight.shape[-2:]) for weight in model.parameters() if weight.ndim > 1),
        scores=heads * (layers_of(config) or 1),
        texts=recipe.batch_size,
        length=recipe.max_length,
        fixed=20 * sum(p.numel() for p in model.parameters()),
        room=device_bytes,
    )
