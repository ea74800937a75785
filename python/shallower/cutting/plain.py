"""Models that ``config.json`` alone describes; no torch is needed to know their cuts.

In these families every layer has the same parts, and layers differ in the few keys alone that
follow the survivors here. What the table says of a family is what transformers
builds: the tests cut every one of them both ways. Whatever is unusual is left to
:class:`.twin.BuiltModel`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeGuard

from ..errors import ModelError
from ..models.layer_config import shorten
from .tensor_names import edit_config

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_NORMS_AFTER = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
_NORMS_AROUND = (*_NORMS, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")
_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_NORMS_OF_HEADS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

VECTORS = {
    "arcee": _NORMS,
    "cohere2": _NORMS[:1],
    "gemma": _NORMS,
    "gemma2": _NORMS_AROUND,
    "gemma3_text": (*_NORMS_OF_HEADS, *_NORMS_AROUND),
    "granite": _NORMS,
    "granitemoe": _NORMS,
    "helium": _NORMS,
    "llama": _NORMS,
    "mistral": _NORMS,
    "mixtral": _NORMS,
    "olmo2": (*_NORMS_OF_HEADS, *_NORMS_AFTER),
    "olmo3": (*_NORMS_OF_HEADS, *_NORMS_AFTER),
    "olmoe": (*_NORMS_OF_HEADS, *_NORMS),
    "phi3": _NORMS,
    "qwen2": (*_BIASES, *_NORMS),
    "qwen3": (*_NORMS_OF_HEADS, *_NORMS),
    "smollm3": _NORMS,
}
"""By model type, the one-dimensional weights of a layer, in the order of its modules; after the
layers comes ``model.norm.weight``, and nothing else."""

_UNUSUAL = (
    "attention_bias",
    "mlp_bias",
    "per_layer_config",
    "mlp_layer_types",
    "auto_map",
    "configuration_files",
    "text_config",
)
"""Keys that, where they are set, make other layers or lead elsewhere."""

_WINDOWED = ("qwen2", "qwen3")
"""Full attention everywhere unless ``use_sliding_window`` is set."""

_PERIODS = {"cohere2": 4, "gemma2": 2, "gemma3_text": 6, "olmo3": 4}
"""One layer in so many has full attention, unless ``sliding_window_pattern`` says otherwise."""

_LISTS = {
    **dict.fromkeys((*_WINDOWED, *_PERIODS), ("layer_types",)),
    "smollm3": ("no_rope_layers", "layer_types"),
}
"""The lists with an entry for every layer."""

_KINDS = {"full_attention", "sliding_attention", 0, 1}


@dataclass(frozen=True, slots=True)
class PlainModel:
    """A model of one of these families; a :class:`.tensor_names.Description`."""

    name: str
    shape: tuple[str, int, int, int]
    defaults: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Place of the layers."""
        return "model.layers"

    @property
    def kinds(self) -> Sequence[object]:
        """All layers are alike."""
        return (None,) * self.shape[1]

    def vectors(self) -> Iterator[str]:
        """The names of the one-dimensional weights, in the order of the modules."""
        for index in range(self.shape[1]):
            yield from (f"{self.path}.{index}.{name}" for name in VECTORS[self.shape[0]])
        yield "model.norm.weight"

    def shortened(self, raw: Mapping[str, Any], survivors: Sequence[int]) -> dict[str, Any]:
        """The JSON of the config for the layers that stay, unknown keys included.

        ModelError: a key of another family that the survivors do not fit.
        """
        before = {**self.defaults, **raw}
        after = SimpleNamespace(**before)
        try:
            shorten(after, self.shape[1], survivors)
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ModelError(
                f"the config cannot describe the layers {list(survivors)} alone: {error}"
            ) from error
        return edit_config(raw, before, vars(after), aliases={})


def plain_model(folder: Path, raw: Mapping[str, Any]) -> PlainModel | None:
    """The model of a config's JSON; None if it is of no plain family, or unusual in any way."""
    family = raw.get("model_type")
    total, width, vocabulary = (raw.get(key) for key in _SIZES)
    if not isinstance(family, str) or family not in VECTORS or not folder.name:
        return None
    if not _is_size(total) or not _is_size(width) or not _is_size(vocabulary):
        return None
    lists = _LISTS.get(family, ())
    if any(raw.get(key) for key in _UNUSUAL) or (raw.get("layer_types") and not lists):
        return None
    defaults = _defaults(family, total, raw)
    described = {**defaults, **raw}
    for name in lists:
        kinds = described.get(name)
        if not isinstance(kinds, list) or len(kinds) != total:
            return None
        if any(not isinstance(kind, str | int) or kind not in _KINDS for kind in kinds):
            return None
    return PlainModel(folder.name, (family, total, width, vocabulary), defaults)


_SIZES = ("num_hidden_layers", "hidden_size", "vocab_size")


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _defaults(family: str, total: int, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values that transformers takes for the keys that a config lacks."""
    defaults: dict[str, Any] = {}
    if family in _WINDOWED:
        defaults["max_window_layers"] = 28
        if not raw.get("use_sliding_window"):
            defaults["layer_types"] = ["full_attention"] * total
    if family in _PERIODS:
        period = raw.get("sliding_window_pattern", _PERIODS[family])
        if type(period) is int and period > 0:
            kinds = ("full_attention", "sliding_attention")
            defaults["layer_types"] = [kinds[(i + 1) % period > 0] for i in range(total)]
    return defaults
