"""The plan and the settings of a healing, and what is refused before a model is loaded."""

import math
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.checkpoint import identity_of
from ..cutting.checkpoint_files import is_checkpoint
from ..errors import MissingExtraError, PlanError, ProcessesError, RecipeError
from ..memory.device import device_room
from ..memory.rehearsal import build_empty
from ..memory.weights import BESIDE, left_bytes
from ..models.architecture import admitted_length, find_layers
from ..models.decoder import Decoder
from ..models.dtypes import QUANTISED, choose_device_map, choose_dtype
from ..models.feed_forward import feed_forward_targets
from ..models.identity import stored_dtype
from ..models.loading import layers_of, read_config
from ..models.quantised import check_stored
from ..models.source import ModelSource
from ..patching.memory import temporary_bytes
from ..processes import num_processes
from ..settings.recipe import GLOBAL_BATCH, ModelFacts, Recipe, Resolved
from ..storage import check_room
from ..texts.sequences import read_samples
from ..values.plan import Plan

CHECKPOINTS = 3
"""Checkpoints of a training that are there at once: the best, the last, and the next one."""


def check_original(original: str, plan: Plan, trust_remote_code: bool = False) -> None:
    """Refuse, before it is loaded, a model of another plan; on the hub by its number of layers."""
    known = identity_of(original, trust_remote_code) if is_checkpoint(original) else None
    if known is not None:
        plan.check_model(known)
    else:
        plan.check_layers(layers_of(read_config(original, None, trust_remote_code)), original)


def resolve(
    path: str,
    plan: Plan,
    recipe: Recipe,
    *,
    trust_remote_code: bool = False,
    device_memory: str | int | None = None,
    answers: bool = False,
) -> Resolved:
    """Resolve the settings for a cut by its config and the device's memory; given ones stay.

    ``device_memory`` is in bytes or as ``16GB``, by default what is free.
    """
    from .memory import is_small, plan_healing, require_room  # which imports the Trainer

    config, resolved = settle(
        path, plan, recipe, trust_remote_code=trust_remote_code, answers=answers
    )
    if recipe.batch_size is not None and recipe.recompute is not None:
        return resolved
    room = device_room(device_memory, num_processes())
    if not room.card and is_small(config, resolved, room.size):
        return resolved
    memory = plan_healing(
        config,
        resolved,
        room=room,
        batch_size=recipe.batch_size,
        recompute=recipe.recompute,
        processes=num_processes(),
        uncut_layers=plan.num_layers,
    )
    require_room(memory, resolved)
    return replace(
        resolved, batch_size=memory.micro_batch, recompute=bool(memory.gradient_checkpointing)
    )


def settle(
    path: str,
    plan: Plan,
    recipe: Recipe,
    *,
    trust_remote_code: bool = False,
    answers: bool = False,
) -> tuple[PretrainedConfig, Resolved]:
    """Read the config of a cut, and resolve the settings that no memory decides."""
    config = read_config(path, trust_remote_code=trust_remote_code)
    resolved = recipe.resolve(
        facts(config, plan.num_layers), num_processes(), auto=auto_dtype(), answers=answers
    )
    check_stored(path, config, resolved.dtype)
    return config, resolved


def check_disk(
    out: Path,
    cut: ModelSource,
    plan: Plan,
    *,
    recipe: Recipe,
    answers: bool = False,
    merge: bool = False,
    from_patch: bool = False,
) -> int:
    """Refuse a disk without room for checkpoints and the result; return their bytes.

    Each checkpoint has every trained value in float32, and two moments of Adam.
    """
    allows = cut.trust_remote_code
    config, settings = settle(str(cut), plan, recipe, trust_remote_code=allows, answers=answers)
    model = build_empty(config, torch.bfloat16)
    targets = feed_forward_targets(model, settings.attention)
    named = dict(model.named_parameters())
    names = [*(f"{name}.weight" for name in targets.modules), *targets.parameters]
    shapes = [named[name].shape for name in names]
    trained = settings.rank * sum(math.prod(one[:-2]) * sum(one[-2:]) for one in shapes)
    whole = cut.stored_bytes or left_bytes(replace(cut, dtype="bfloat16"), ())
    saved = (merge + from_patch) * whole
    needed = 4 * trained * (3 * CHECKPOINTS + 1) + saved + BESIDE
    longest = settings.max_length
    check_room(out, needed, temporary_bytes(cut, max_length=longest) if from_patch else 0)
    return needed


def require_healable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    recipe: Recipe,
    answers: bool = False,
) -> Resolved:
    """Refuse what can be known before the uncut ``model`` is cut, patched and healed.

    No more texts are read than one step takes.
    """
    require_peft()
    dtype = stored_dtype(model)
    if dtype in QUANTISED:
        raise RecipeError(
            f"adapters are not merged into weights of {dtype}: cut plain ones (dtype, "
            f"--dtype bfloat16)",
            see="order",
        )
    of_model = facts(model.config, len(find_layers(model)))
    resolved = recipe.resolve(of_model, auto=auto_dtype(), answers=answers)
    read_samples(
        tokenizer,
        texts,
        max_length=resolved.max_length,
        packing=resolved.packing,
        num_samples=GLOBAL_BATCH,
        share=resolved.share,
    )
    return resolved


def require_peft(purpose: str = "healing") -> None:
    """Raise MissingExtraError, which names the purpose, if peft is not installed."""
    if find_spec("peft") is None:
        raise MissingExtraError("peft", "heal", purpose)


def require_one_process() -> None:
    """Refuse to patch in one of several processes by a ProcessesError."""
    if num_processes() > 1:
        raise ProcessesError(
            "several processes cannot patch together: shallower patch the model first, and heal "
            "what it leaves"
        )


def require_plan_of(decoder: Decoder, plan: Plan, path: str) -> None:
    """Refuse, by a PlanError, a plan that leaves another number of layers than its model has."""
    if len(plan.survivors) != len(decoder):
        raise PlanError(
            f"the plan beside {path} leaves {len(plan.survivors)} layers, and the model has "
            f"{len(decoder)}: it is of another cut"
        )


def auto_dtype() -> Literal["bfloat16", "float32"]:
    """Decide the dtype that ``auto`` stands for on this machine."""
    return choose_dtype(choose_device_map(None))[0]


def facts(config: PretrainedConfig, num_layers: int) -> ModelFacts:
    """Find the properties that decide the preset of a model, of so many layers before the cut."""
    decoder: Any = config.get_text_config(decoder=True)
    return ModelFacts(
        model_type=decoder.model_type,
        hidden_size=decoder.hidden_size,
        num_layers=num_layers,
        positions=admitted_length(decoder),
        vocab_size=getattr(decoder, "vocab_size", None),
    )
