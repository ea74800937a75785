"""The memory that a stage will need, by the config of the model alone."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import ModelError
from ..models.dtypes import (
    DEQUANTISED,
    QUANTISED,
    STREAM,
    check_dtype,
    choose_device_map,
    choose_dtype,
    stored_quantisation,
)
from ..models.source import ModelSource
from ..settings.recipe import Recipe
from ..values.estimates import MemoryPlan
from ..values.files import PLAN_FILE
from ..values.layers import deepest_block
from ..values.plan import Plan
from ..values.positions import Positions
from ..values.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..memory.device import Room
    from ..memory.plan import Forward

Stage = Literal["heal", "patch", "scan", "eval"]


def memory_forecast(
    config: "PretrainedConfig | str | Path",
    what: Stage = "heal",
    *,
    dtype: str | None = None,
    max_length: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    rank: int | None = None,
    recipe: Recipe | None = None,
    answers: bool = False,
    gradient_checkpointing: bool | None = None,
    drop: int = 0,
    num_tokens: int = 131_072,
    positions: str | Positions = "last",
    experts: bool = False,
    device_memory: str | int | None = None,
    processes: int = 1,
    trust_remote_code: bool = False,
) -> MemoryPlan:
    """Plan the memory of a stage without a model, for a device that need not be here.

    The model is built from its config without weights. The stage's own forward, loss and backward
    run on it, on tensors that have shapes alone.

    Args:
        config: of transformers; or the folder or hub id of a model or of a cut.
        what: ``heal``, ``patch``, ``scan`` or ``eval``.
        dtype: dtype of the weights, as :func:`shallower.load_model` takes it; by default ``nf4``
            to heal, and else ``bfloat16``. ``auto`` is bfloat16 on a card.
        max_length: tokens of a text at most; by default the preset's to heal, and else 256.
        batch_size: texts in one forward; ``auto`` is what the device has memory for.
        rank: rank of the adapters of a healing; by default the preset's.
        recipe: the other settings of a healing.
        answers: whether a healing trains on answers, too.
        gradient_checkpointing: recomputation in a healing; by default where it must be.
        drop: decoder layers of ``config`` that will have been dropped.
        num_tokens: tokens that a patch fits, at most.
        positions: the tokens of every text that a scan compares.
        experts: whether a scan gathers statistics of experts, too, which then run twice.
        device_memory: the memory of a card, here or not, in bytes or as ``16GB``; by default
            what this machine's device has free.
        processes: processes that share a healing, each on a device of its own.
        trust_remote_code: run code that comes with the model.

    Returns:
        The plan; without a peak where a model of this family cannot be rehearsed.

    Raises:
        ModelError: the config cannot be read, ``device_memory`` is no size, or there is no such
            ``dtype``.
        RecipeError: settings of a healing that do not fit the model.

    Example:
        >>> from transformers import LlamaConfig
        >>> llama = LlamaConfig(num_hidden_layers=4)  # the widths of Llama-2-7B
        >>> plan = sh.memory_forecast(llama, max_length=2048, rank=2, device_memory="16GB")
        >>> plan.micro_batch, plan.gradient_checkpointing, plan.fits
        (4, False, True)
    """
    if what not in get_args(Stage):
        raise ModelError(f"unknown stage {what!r}: expected one of {', '.join(get_args(Stage))}")
    from ..memory.device import device_room
    from ..models.loading import layers_of, read_config

    total = None
    if isinstance(config, str | Path):
        place, config = config, read_config(config, trust_remote_code=trust_remote_code)
        total = _layers_of_uncut(str(place)) if what == "heal" else None
    total = total or layers_of(config)
    if total is None:
        raise ModelError("the config does not say how many layers the model has")
    if drop:
        config = shortened(config, drop)
    room = device_room(device_memory, processes)
    if what == "heal":
        given: dict[str, Any] = {
            "dtype": dtype,
            "max_length": max_length,
            "rank": rank,
            "batch_size": None if batch_size == "auto" else batch_size,
            "recompute": gradient_checkpointing,
        }
        named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        chosen = replace(recipe or Recipe(), **named)
        return _healing(config, total, chosen, room=room, processes=processes, answers=answers)
    tokens = Tokens(max_length or 256, batch_size)
    stored = stored_quantisation(getattr(config, "quantization_config", None))
    dtype = _decided(dtype, what, card=room.card, stored=stored)
    if what == "patch":
        from ..patching.memory import plan_patch

        return plan_patch(config, dtype, tokens=tokens, num_tokens=num_tokens, room=room)
    from ..memory.plan import plan_forward

    rehearsed = _forward(what, positions, experts=experts)
    return plan_forward(config, dtype, rehearsed, tokens=tokens, room=room)


def _decided(dtype: str | None, what: Stage, *, card: bool, stored: str | None) -> str:
    """The dtype of the weights of a forward or a patch; one that does not exist is refused."""
    dtype = dtype or "bfloat16"
    check_dtype(dtype)
    kinds = {dtype} & {*QUANTISED} | {stored} - {None, *DEQUANTISED}
    if what == "patch" and kinds:
        raise ModelError(
            f"weights of {kinds.pop()} are not patched: name a model with plain ones, or another "
            f"dtype (dtype, --dtype)"
        )
    if dtype == "auto":
        return "bfloat16" if card else choose_dtype(choose_device_map(None))[0]
    return dtype


def _layers_of_uncut(path: str) -> int | None:
    """The layers of the model that a model was cut out of, if it is a cut."""
    from transformers.utils.hub import cached_file

    place = Path(path).expanduser() / PLAN_FILE
    found = str(place) if place.is_file() else None
    if not place.parent.exists():
        found = cached_file(path, PLAN_FILE, _raise_exceptions_for_missing_entries=False)
    return Plan.load(found).num_layers if found is not None else None


def shortened(config: "PretrainedConfig", drop: int) -> "PretrainedConfig":
    """The config without its deepest layers but the last; all layers are about as large."""
    from ..models.layer_config import shorten
    from ..models.loading import layers_of

    shortened = copy.deepcopy(config)
    total = layers_of(config) or 0
    block = deepest_block(total, drop)
    survivors = [index for index in range(total) if index not in range(block.start, block.stop)]
    shorten(shortened.get_text_config(decoder=True), total, survivors)
    return shortened


def _healing(
    config: "PretrainedConfig",
    num_layers: int,
    recipe: Recipe,
    *,
    room: "Room",
    processes: int,
    answers: bool,
) -> MemoryPlan:
    from ..healing.checks import auto_dtype, facts, require_peft
    from ..healing.memory import plan_healing

    require_peft("the forecast of a healing")
    auto: Any = "bfloat16" if room.card else auto_dtype()
    resolved = recipe.resolve(facts(config, num_layers), processes, auto=auto, answers=answers)
    return plan_healing(
        config,
        resolved,
        room=room,
        batch_size=recipe.batch_size,
        recompute=recipe.recompute,
        processes=processes,
        uncut_layers=num_layers,
    )


def _forward(what: Stage, positions: str | Positions, *, experts: bool) -> "Forward":
    from ..evaluation.loss import FORWARD
    from ..scanning.hidden_states import forward

    if isinstance(positions, str):
        positions = Positions.parse(positions)
    return forward(positions, experts=experts) if what == "scan" else FORWARD


def memory_facts(source: ModelSource, plan: MemoryPlan) -> dict[str, Any]:
    """A forecast for a dry run, with the way out where it does not fit."""
    if plan.fits or source.is_streamed:
        return {"memory": plan}
    return {"memory": plan, "way out": "stream the layers from disk (--stream)"}


def forecast_source(
    source: ModelSource,
    what: Stage,
    tokens: Tokens,
    *,
    device_memory: str | int | None = None,
    positions: Positions | None = None,
    experts: bool = False,
    num_tokens: int | None = None,
    processes: int = 1,
) -> MemoryPlan:
    """Plan a stage's memory for a model by its place; ``auto`` is the dtype of the card."""
    dtype = source.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device_memory is not None else source.resolved().dtype
    config = source.read_config()
    drop = 0
    if source.device_map == STREAM:  # two layers are there at once
        drop = max(0, source.count_layers() - 2)
    return memory_forecast(
        config,
        what,
        dtype=dtype,
        drop=drop,
        max_length=tokens.max_length,
        batch_size=tokens.batch_size,
        positions=positions or "last",
        experts=experts,
        device_memory=device_memory,
        num_tokens=num_tokens or 131_072,
        processes=processes,
    )
