"""What a config says of its layers, made to fit the survivors; the rules as data.

A rule here only proposes. :mod:`shallower.pruning` builds a model from the shortened config
and refuses the cut if its layers are not the survivors.
"""

import math
from collections.abc import Sequence
from typing import Any

LAYER_COUNTS = ("num_hidden_layers", "num_blocks")
"""Where configs keep the number of decoder layers; others map theirs to the first."""

LEADING_COUNTS = ("first_k_dense_replace", "num_dense_layers")
"""The number of first layers of another kind."""

INDEX_LISTS = (
    "attn_layer_indices",
    "full_attn_idxs",
    "mlp_only_layers",
    "moe_layers",
    "rope_scaling_layers",
    "hybrid_layer_ids",
)
"""Lists of layer indices, 0-based."""

ONE_BASED_INDEX_LISTS = ("ple_layer_ids",)
"""Lists of layer indices, 1-based."""

INDEX_KEYS = ("per_layer_config",)
"""Mappings whose keys are layer indices."""

CYCLED_LISTS = ("block_types",)
"""Patterns that are repeated until there is an entry for every layer."""

PATTERNS = (
    ("attn_layer_period", "attn_layer_offset"),
    ("expert_layer_period", "expert_layer_offset"),
)
"""Layer i is of another kind where ``i % period == offset``."""


ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention", "hybrid"}
"""Kinds of layers with keys and values in the cache."""


def shorten(config: Any, total: int, survivors: Sequence[int]) -> None:
    """Rewrite a decoder's config for the layers that survive, in place.

    Args:
        config: of transformers, the decoder's part.
        total: decoder layers before the cut.
        survivors: the indices of those that stay, ascending.

    Raises:
        ValueError: a pattern that the survivors do not follow.
    """
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        changed = _shortened(name, value, total, survivors)
        if changed is not None:
            changes[name] = changed
    changes |= _patterns(config, survivors) | _scalars(config, total, survivors)
    _check_attention(config, survivors)
    _set_count(config, total, len(survivors))
    for name, value in changes.items():
        setattr(config, name, value)


def _check_attention(config: Any, survivors: Sequence[int]) -> None:
    """Refuse a hybrid without any attention layer: its cache counts tokens by one."""
    kinds = getattr(config, "layer_types", None)
    if not isinstance(kinds, list | tuple) or len(kinds) <= max(survivors):
        return
    if ATTENTION & set(kinds) and not ATTENTION & {kinds[index] for index in survivors}:
        raise ValueError("no attention layer would be left, and cached generation needs one")


def _set_count(config: Any, total: int, count: int) -> None:
    for name in LAYER_COUNTS:
        value = getattr(config, name, None)
        # LongCat-Flash counts two attentions a layer.
        if isinstance(value, int) and value in (total, 2 * total):
            setattr(config, name, count * (value // total))


def _shortened(name: str, value: Any, total: int, survivors: Sequence[int]) -> Any:
    place = {old: new for new, old in enumerate(survivors)}
    if name in LEADING_COUNTS and isinstance(value, int):
        return sum(index < value for index in survivors)
    if name in INDEX_LISTS and isinstance(value, list | tuple):
        return [place[index] for index in value if index in place]
    if name in ONE_BASED_INDEX_LISTS and isinstance(value, list | tuple):
        return [place[index - 1] + 1 for index in value if index - 1 in place]
    if name in INDEX_KEYS and isinstance(value, dict):
        return {
            type(key)(place[int(key)]): entry for key, entry in value.items() if int(key) in place
        }
    if name in CYCLED_LISTS and isinstance(value, list | tuple) and value:
        return [value[index % len(value)] for index in survivors]
    if isinstance(value, list | tuple) and len(value) == total and _is_per_layer(name):
        return [value[index] for index in survivors]
    return None


def _is_per_layer(name: str) -> bool:
    """Lists that are not per layer, should they happen to have the right length."""
    return not name.endswith(("_token_id", "_token_ids")) and name != "architectures"


def _patterns(config: Any, survivors: Sequence[int]) -> dict[str, int]:
    """Periods and offsets that give the survivors their kinds, the smallest period first."""
    changes: dict[str, int] = {}
    for period_name, offset_name in PATTERNS:
        period, offset = getattr(config, period_name, None), getattr(config, offset_name, None)
        if not isinstance(period, int) or not isinstance(offset, int) or period < 1:
            continue
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
    if hasattr(config, "scale_depth") and config.scale_depth is not None:  # scale / sqrt(layers)
        changes["scale_depth"] = config.scale_depth * math.sqrt(count / total)
    shared = getattr(config, "num_kv_shared_layers", None)
    if isinstance(shared, int) and shared > 0:  # the last layers reuse keys and values
        changes["num_kv_shared_layers"] = sum(index >= total - shared for index in survivors)
    windowed = getattr(config, "max_window_layers", None)
    if isinstance(windowed, int):
        changes["max_window_layers"] = sum(index < windowed for index in survivors)
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
