"""Rewriting a config for the layers that survive a cut; the rules are data, and only propose.

:mod:`shallower.cutting.twin` builds a model from the result, and refuses other layers.
"""

import math
from collections.abc import Sequence
from typing import Any

LAYER_COUNTS = ("num_hidden_layers", "num_blocks")
"""Keys under which configs keep the number of decoder layers; others map theirs to the first."""

DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")
"""Keys of configs that count the layers of an encoder as well, which are then the first."""

LEADING_COUNTS = (
    "first_k_dense_replace",
    "num_dense_layers",
    "max_window_layers",
    "loop_layer_index_start",
    "loop_layer_index_end",
)
"""The number of first layers of another kind, or where a stretch of layers starts or ends."""

INDEX_LISTS = (
    "attn_layer_indices",
    "full_attn_idxs",
    "mlp_only_layers",
    "moe_layers",
    "rope_scaling_layers",
    "hybrid_layer_ids",
    "cross_attention_layers",
    "local_layer_ids",
    "index_layers",
)
"""Lists of layer indices, 0-based."""

ONE_BASED_INDEX_LISTS = ("ple_layer_ids",)
"""Lists of layer indices, 1-based."""

CYCLED_LISTS = ("block_types",)
"""Patterns that are repeated until there is an entry for every layer."""

PATTERNS = (
    ("attn_layer_period", "attn_layer_offset"),
    ("expert_layer_period", "expert_layer_offset"),
)
"""Layer i is of another kind where ``i % period == offset``."""


WITHOUT_CACHE = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"}
"""Kinds of layers without keys and values in the cache."""


def shorten(config: Any, total: int, survivors: Sequence[int]) -> None:
    """Rewrite a decoder's config of ``total`` layers in place for the survivors, ascending.

    Values are validated together, when it is read back; ValueError for a pattern that survivors
    break.
    """
    values = vars(config)
    changes: dict[str, Any] = {}
    for name, value in values.items():
        changed = _shortened(name, value, total, survivors)
        if changed is not None:
            changes[name] = changed
    changes |= _counts(config, total, len(survivors))
    changes |= _patterns(config, survivors) | _scalars(config, total, survivors)
    _check_kinds(config, survivors)
    overrides = values.pop("_heterogeneity_spec", None)
    values.update(changes)
    if overrides is not None:
        place = {old: new for new, old in enumerate(survivors)}
        config.per_layer_config = {
            place[index]: entry
            for index, entry in overrides.per_layer_overrides.items()
            if index in place
        }


def layer_counts(config: Any) -> dict[str, int]:
    """The numbers of layers that a decoder's config names, by key; the decoder's first."""
    names = (
        DECODER_COUNTS if any(hasattr(config, name) for name in DECODER_COUNTS) else LAYER_COUNTS
    )
    found = {_key(config, name): getattr(config, name, None) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def num_decoder_layers(config: Any) -> int | None:
    """Count the layers that a decoder's config describes; None where it does not say."""
    count = next(iter(layer_counts(config).values()), None)
    modules = getattr(config, "num_layers", None)
    if count is not None and isinstance(modules, int) and count == 2 * modules:
        return modules
    return count


def image_layers(config: Any) -> tuple[int, ...]:
    """The layers, by their numbers, that inner features of images are added to (DeepStack)."""
    if placed := getattr(config, "deepstack_layer_map", None):
        return tuple(layer for _, layer in placed)
    tower = getattr(config, "vision_config", config)
    return tuple(range(len(getattr(tower, "deepstack_visual_indexes", None) or ())))


def heads_of(config: Any) -> int:
    """The attention heads of a layer; 64 where layers differ, 1 where there are none."""
    try:
        return int(getattr(config, "num_attention_heads", None) or 1)
    except Exception:  # of a config by layer, which has no one number
        return 64


def _key(config: Any, name: str) -> str:
    """The key under which a config keeps what it also calls by this name."""
    aliases: dict[str, str] = getattr(config, "attribute_map", {})
    return aliases.get(name, name)


def _counts(config: Any, total: int, count: int) -> dict[str, int]:
    """The counts after the cut; a multiple of the layers stays one."""
    # LongCat-Flash counts two attentions a layer.
    names = {*layer_counts(config), "num_layers"}
    if not getattr(config, "is_encoder_decoder", False):
        names |= {_key(config, name) for name in LAYER_COUNTS}
    values = {name: vars(config).get(name) for name in names}
    return {
        name: count * (value // total)
        for name, value in values.items()
        if isinstance(value, int) and value in (total, 2 * total)
    }


def _check_kinds(config: Any, survivors: Sequence[int]) -> None:
    """Refuse survivors that lack what others of them rely on at run time."""
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list | tuple) and len(kinds) > max(survivors):
        # A cache counts its tokens by an attention layer.
        if set(kinds) - WITHOUT_CACHE and not {kinds[i] for i in survivors} - WITHOUT_CACHE:
            raise ValueError("no attention layer would be left, and cached generation needs one")
        first, new_first = kinds[0] in WITHOUT_CACHE, kinds[survivors[0]] in WITHOUT_CACHE
        if config.model_type == "minimax" and new_first and not first:
            raise ValueError("its cache counts tokens by layer 0, which must be an attention layer")
        shared = getattr(config, "num_kv_shared_layers", None)
        if isinstance(shared, int) and 0 < shared < len(kinds):
            producing = {kinds[i] for i in survivors if i < len(kinds) - shared}
            if lacking := {kinds[i] for i in survivors} - producing:
                raise ValueError(
                    f"no layer of {min(lacking)} would be left whose cache others share"
                )
    indexers = getattr(config, "indexer_types", None)
    if isinstance(indexers, list | tuple) and len(indexers) > max(survivors):
        for index in survivors:
            if indexers[index] == "full":
                break
            if indexers[index] == "shared":
                raise ValueError(
                    f"layer {index} shares the indexer of an earlier layer, which goes"
                )


def _shortened(name: str, value: Any, total: int, survivors: Sequence[int]) -> Any:
    place = {old: new for new, old in enumerate(survivors)}
    if name in LEADING_COUNTS and isinstance(value, int) and value <= total:
        return sum(index < value for index in survivors)
    if name in INDEX_LISTS and isinstance(value, list | tuple):
        return [place[index] for index in value if index in place]
    if name in ONE_BASED_INDEX_LISTS and isinstance(value, list | tuple):
        return [place[index - 1] + 1 for index in value if index - 1 in place]
    if name == "kv_source_layers" and isinstance(value, list | tuple):
        if gone := [index for index in survivors if value[index] not in place]:
            raise ValueError(f"layer {gone[0]} shares the cache of layer {value[gone[0]]}")
        return [place[value[index]] for index in survivors]
    if name in CYCLED_LISTS and isinstance(value, list | tuple) and value:
        return [value[index % len(value)] for index in survivors]
    if isinstance(value, list | tuple) and len(value) == total and _is_per_layer(name):
        return [value[index] for index in survivors]
    return None


def _is_per_layer(name: str) -> bool:
    """Lists that are not per layer, should they happen to have the right length."""
    is_more = name.startswith(("mtp_", "nextn_"))  # of the layers for more tokens
    return not (is_more or name.endswith(("_token_id", "_token_ids")) or name == "architectures")


def _patterns(config: Any, survivors: Sequence[int]) -> dict[str, int]:
    """Periods and offsets that give the survivors their kinds, the smallest period first."""
    changes: dict[str, int] = {}
    for period_name, offset_name in PATTERNS:
        period, offset = getattr(config, period_name, None), getattr(config, offset_name, None)
        if not isinstance(period, int) or not isinstance(offset, int) or period < 1:
            continue
        if period_name == "attn_layer_period" and "layers_block_type" in vars(config):
            continue  # Zamba: the pattern made the list, which is what counts
        kinds = [index % period == offset for index in survivors]
        found = [(period, offset)] + [
            (p, o) for p in range(1, len(survivors) + 2) for o in range(p)
        ]
        for new_period, new_offset in found:
            if [i % new_period == new_offset for i in range(len(survivors))] == kinds:
                changes |= {period_name: new_period, offset_name: new_offset}
                break
        else:
            raise ValueError(
                f"no {period_name} and {offset_name} describe layers of the kinds "
                f"{''.join('x' if kind else '.' for kind in kinds)}"
            )
    return changes


def _scalars(config: Any, total: int, survivors: Sequence[int]) -> dict[str, Any]:
    """Rules of single families."""
    count = len(survivors)
    changes: dict[str, Any] = {}
    start = getattr(config, "moe_layer_start_index", None)
    if isinstance(start, int):  # Ernie 4.5: MoE from start to end, every interval-th
        changes |= _moe_range(config, start, survivors)
    sections = ("n_input_layers", "n_recurrent_layers", "n_output_layers")
    if all(isinstance(getattr(config, name, None), int) for name in sections):  # Dory
        first = 0
        for name in sections:
            last = first + getattr(config, name)
            changes[name] = sum(first <= index < last for index in survivors)
            first = last
    step, dense = getattr(config, "decoder_sparse_step", None), vars(config).get("mlp_only_layers")
    if isinstance(step, int) and step > 1 and isinstance(dense, list):  # Qwen: every step-th
        sparse = [(index + 1) % step == 0 and index not in dense for index in survivors]
        changes["decoder_sparse_step"] = 1
        changes["mlp_only_layers"] = [new for new, kind in enumerate(sparse) if not kind]
    if hasattr(config, "scale_depth") and config.scale_depth is not None:  # scale / sqrt(layers)
        changes["scale_depth"] = config.scale_depth * math.sqrt(count / total)
    shared = getattr(config, "num_kv_shared_layers", None)
    if isinstance(shared, int) and shared > 0:  # the last layers reuse keys and values
        changes["num_kv_shared_layers"] = sum(index >= total - shared for index in survivors)
    return changes


def _moe_range(config: Any, start: int, survivors: Sequence[int]) -> dict[str, int]:
    end, interval = config.moe_layer_end_index, config.moe_layer_interval
    kinds = [(i + 1) % interval == 0 and start <= i <= end for i in survivors]
    sparse = [new for new, kind in enumerate(kinds) if kind]
    if not sparse:
        return {"moe_layer_start_index": len(survivors), "moe_layer_end_index": len(survivors)}
    for new_interval in range(1, len(survivors) + 1):
        rebuilt = [
            (i + 1) % new_interval == 0 and sparse[0] <= i <= sparse[-1]
            for i in range(len(survivors))
        ]
        if rebuilt == kinds:
            return {
                "moe_layer_start_index": sparse[0],
                "moe_layer_end_index": sparse[-1],
                "moe_layer_interval": new_interval,
            }
    raise ValueError(f"no moe_layer_interval describes MoE layers at {sparse}")
