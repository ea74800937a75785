"""The bytes that a healing writes, counted before its memory is planned."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from ..memory.checkpoints import BESIDE, left_bytes
from ..memory.rehearsal import build_empty
from ..models.feed_forward import feed_forward_targets
from ..models.source import ModelSource
from ..patching.memory import temporary_bytes
from ..storage import check_room
from ..values.plan import Plan
from ..values.recipe import Recipe
from .checks import settle

CHECKPOINTS = 3
"""Checkpoints of a training that are there at once: the best, the last, and the next one."""


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
    """Refuse a disk without room for checkpoints of adapters, and what is saved of the cut.

    Each checkpoint has every trained value in float32, and two moments of Adam. Returns the bytes.
    OutputError where there is no room, else raises as ``settle``.
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
