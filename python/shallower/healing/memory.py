"""The memory of a healing: rehearsed without weights, and the batch that is chosen by it."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from ..errors import ModelError, RecipeError
from ..memory.rehearsal import Rehearsal, build_empty, first_that_runs
from ..memory.sizes import dequantised_bytes, weight_bytes
from ..models.dtypes import computing
from ..models.feed_forward import feed_forward_targets
from ..models.layer_config import heads_of
from ..models.loading import layers_of
from ..values.memory import MemoryPlan, format_size, needed_device, usable
from ..values.recipe import GLOBAL_BATCH, TEACHER_SHARES, Resolved
from .distillation import Teacher
from .losses import TrainingLoss
from .training import add_adapters

MOST_KEPT, MOST_RECOMPUTED = 4, 8
"""Texts in one forward at most, without recomputation and with it."""

_ADAPTER_BYTES = 4 * 4
"""A trained parameter in float32, its gradient, and two moments of Adam."""

PARTS = ("weights", "adapters and optimiser", "activations and loss")


class HealingStep:
    """One forward and backward of a healing, on a model without weights.

    Args:
        config: of the cut.
        recipe: the settings.
        experts: the way that experts are run; None is the model's own.

    Raises:
        ModelError: no model can be built from the config, or nothing of it can be adapted.
    """

    def __init__(
        self, config: PretrainedConfig, recipe: Resolved, *, experts: str | None = None
    ) -> None:
        dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        model = build_empty(config, dtype, experts=experts)
        targets = feed_forward_targets(model, recipe.attention)
        self.recipe = recipe.without_dropout() if targets.parameters else recipe
        self.weights = weight_bytes(model, recipe.dtype)
        self._dequantised = dequantised_bytes(model, recipe.dtype)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            adapted = add_adapters(model, targets, self.recipe, base="")
        trained = [p for p in adapted.parameters() if p.requires_grad]
        self.adapters = sum(p.numel() for p in trained) * _ADAPTER_BYTES
        self._model, self._adapted = model, adapted.train()
        self._rehearsal = Rehearsal(adapted)
        self._seen: dict[tuple[int, bool], int] = {}

    def parts(self, batch_size: int, recompute: bool) -> dict[str, int]:
        """Count the bytes at the peak.

        Args:
            batch_size: texts in the forward.
            recompute: whether activations are recomputed in the backward pass.

        Returns:
            The bytes by what they are for.
        """
        key = batch_size, recompute
        if key not in self._seen:
            self._seen[key] = self.run(*key)
        activations = self._seen[key] + self._dequantised
        return dict(zip(PARTS, (self.weights, self.adapters, activations), strict=True))

    def estimate(self, batch_size: int, recompute: bool) -> int:
        """Estimate the bytes at the peak from those of one text and of two.

        Args:
            batch_size: texts in the forward.
            recompute: whether activations are recomputed in the backward pass.

        Returns:
            The bytes if every text took as many more as the second.
        """
        one, two = (sum(self.parts(texts, recompute).values()) for texts in (1, 2))
        return one + (batch_size - 1) * (two - one)

    def run(self, batch_size: int, recompute: bool) -> int:
        """Rehearse the step.

        Args:
            batch_size: texts in the forward.
            recompute: whether activations are recomputed in the backward pass.

        Returns:
            The bytes at the peak beside weights and adapters.
        """
        if recompute:
            self._model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self._model.activation_checkpointing_disable()

        def step() -> None:
            ids = torch.zeros((batch_size, self.recipe.max_length), dtype=torch.long)
            mask, lesson = torch.ones_like(ids), None
            with computing(self.recipe, ids.device):
                if share := TEACHER_SHARES.get(self.recipe.objective):
                    lesson = Teacher(self._model, share).lesson(ids, mask)  # of its own kind
                made = TrainingLoss(self._model)
                with made.made_inside(ids, ids.numel(), lesson):
                    outputs = self._adapted(input_ids=ids, attention_mask=mask, use_cache=False)
                loss = made.of(outputs, ids, ids.numel())
            loss.backward()
            for parameter in self._adapted.parameters():
                parameter.grad = None

        return self._rehearsal.run(step, padded=not self.recipe.packing)


def plan_healing(
    config: PretrainedConfig,
    recipe: Resolved,
    *,
    device_bytes: int,
    card: bool,
    batch_size: int | None = None,
    recompute: bool | None = None,
    processes: int = 1,
    uncut_layers: int | None = None,
) -> MemoryPlan:
    """Choose the texts of a forward and recomputation by what a device has room for.

    Args:
        config: of the cut.
        recipe: the settings; its own batch and recomputation are not looked at.
        device_bytes: free memory of the device.
        card: whether it is a GPU, where recomputation is better than swapping.
        batch_size: texts in one forward, if they are given.
        recompute: recomputation, if it is given.
        processes: the number of processes that share a step.
        uncut_layers: decoder layers of the uncut model, which teaches if the recipe distils.

    Returns:
        The first choice that fits, or else the one that needs least; a plan without a peak where
        the model cannot be rehearsed.
    """
    choices = list(_choices(batch_size, recompute, processes, card))
    step = _step_of(config, recipe, recompute is True)
    if step is None:
        texts, recomputed = choices[0]
        return MemoryPlan(None, texts, recomputed, device_bytes)

    def plan(texts: int, recomputed: bool) -> MemoryPlan:
        if not recipe.has_adapters:
            parts = _local_parts(step, config, texts, uncut_layers or 0)
            return MemoryPlan(sum(parts.values()), texts, False, device_bytes, parts)
        parts = step.parts(texts, recomputed)
        if recipe.has_teacher:
            layers = layers_of(config) or 1
            parts["uncut model"] = step.weights * max(layers, uncut_layers or 0) // layers
        return MemoryPlan(sum(parts.values()), texts, recomputed, device_bytes, parts)

    def may_fit(texts: int, recomputed: bool) -> bool:
        """Whether one text fits, which is quickly tried, and more are not far from it."""
        return plan(1, recomputed).fits and (
            texts <= 2 or 0.9 * step.estimate(texts, recomputed) <= usable(device_bytes)
        )

    for texts, recomputed in choices:
        if batch_size is None and not may_fit(texts, recomputed):
            continue
        if plan(texts, recomputed).fits:
            return plan(texts, recomputed)
    return plan(*choices[-1])


def _local_parts(
    step: HealingStep, config: PretrainedConfig, texts: int, uncut_layers: int
) -> dict[str, int]:
    """The bytes of a reconstruction: one model at a time, and one layer that is trained.

    Its activations are at most those of a step that keeps no other layer's.
    """
    layers = layers_of(config) or 1
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    size = 2 if step.recipe.dtype == "bfloat16" else 4
    computed = size if stored == step.recipe.dtype else 4
    weights = step.weights // size * computed
    of_layer = step.weights // size // layers * _ADAPTER_BYTES
    activations = step.parts(texts, True)[PARTS[-1]]
    parts = weights * max(layers, uncut_layers) // layers, of_layer, activations
    return dict(zip(("weights", "layer and optimiser", PARTS[-1]), parts, strict=True))


_LAST: dict[tuple[str, Resolved], HealingStep | None] = {}
"""The step that was rehearsed last: a healing is planned for the user, and again when it begins."""


def _step_of(config: PretrainedConfig, recipe: Resolved, recompute: bool) -> HealingStep | None:
    """The step of a healing, rehearsed once; None where the model cannot be."""

    def rehearsed(experts: str | None) -> HealingStep:
        step = HealingStep(config, recipe, experts=experts)
        step.parts(1, recompute)
        return step

    key = repr(config.to_dict()), replace(recipe, batch_size=1, recompute=False)
    if key not in _LAST:
        found = first_that_runs(rehearsed)
        _LAST.clear()
        _LAST[key] = found
    return _LAST[key]


def _choices(
    batch_size: int | None, recompute: bool | None, processes: int, card: bool
) -> Iterator[tuple[int, bool]]:
    """Batches and recomputation from the fastest on; the last needs least."""
    share = GLOBAL_BATCH // processes
    for recomputed in (False, True) if recompute is None else (recompute,):
        most = MOST_RECOMPUTED if recomputed and card else MOST_KEPT
        for texts in (8, 4, 2, 1) if batch_size is None else (batch_size,):
            if batch_size is not None or (texts <= most and share % texts == 0):
                yield texts, recomputed


def require_room(plan: MemoryPlan, recipe: Resolved) -> None:
    """Refuse a healing that no choice makes fit, and say what would.

    Args:
        plan: as :func:`plan_healing` made it.
        recipe: the settings.

    Raises:
        RecipeError: the device has no room.
    """
    if plan.fits or plan.peak_bytes is None:
        return
    fixed = plan.peak_bytes - plan.parts[PARTS[-1]]
    share = (usable(plan.device_bytes) - fixed) / (plan.peak_bytes - fixed)
    length = int(share * recipe.max_length) // 64 * 64
    needed = f"{format_size(needed_device(plan.peak_bytes))} at least"
    shorter = f"shorten sequences to {length} tokens (max_length, --max-length)"
    others = [shorter] if length >= 64 else []
    if recipe.dtype != "nf4":
        others.append("quantise the weights (dtype, --dtype nf4)")
    raise RecipeError(
        f"healing on sequences of {recipe.max_length} tokens takes a device of {needed}, and there "
        f"are {format_size(plan.device_bytes)}: {' or '.join([*others, 'take a larger one'])}"
    )


def plainly_fits(config: PretrainedConfig, recipe: Resolved, device_bytes: int) -> bool:
    """Tell quickly that a small model fits, whatever its family does; a rehearsal takes longer.

    Args:
        config: of the cut.
        recipe: the settings.
        device_bytes: free memory of the device.

    Returns:
        True if an eighth of the memory would hold several copies of all that the linear maps
        take and give; False says nothing.
    """
    try:
        model = build_empty(config, torch.bfloat16)
    except ModelError:
        return False
    widths = sum(sum(weight.shape[-2:]) for weight in model.parameters() if weight.ndim > 1)
    length = recipe.max_length
    scores = heads_of(config.get_text_config(decoder=True)) * length * (layers_of(config) or 1)
    live = 12 * recipe.batch_size * length * (widths + scores)
    return 8 * (live + 20 * sum(p.numel() for p in model.parameters())) < usable(device_bytes)
