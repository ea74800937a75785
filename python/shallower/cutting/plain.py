"""Models that ``config.json`` alone describes; no torch is needed to know their cuts.

In these families every layer has the same parts, and layers differ only in the keys below, which
are cut by survivors. The tests cut every family by this table and by transformers. Whatever is
unusual is left to :class:`.built.BuiltModel`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeGuard

from ..errors import ModelError
from ..models.layer_config import shorten
from ..values.experts import Routing
from ..values.identity import Shape, title_of
from ..values.plan import Plan
from .mixture import Mixture, StoredLayer
from .tensor_names import SINGLE_EXPERT, edit_config

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
"""By model type, a layer's one-dimensional weights in order; ``model.norm.weight`` comes last."""

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

_MIXTURES = {
    "granitemoe": (
        "num_local_experts",
        "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.output_linear.weight",
        "block_sparse_moe.router.layer.weight",
    ),
    "mixtral": ("num_local_experts", "block_sparse_moe.gate.weight"),
    "olmoe": ("num_experts", "mlp.gate.weight"),
}
"""The key that counts experts, and the stored stacks beside the tensors of single experts."""

_KINDS = {"full_attention", "sliding_attention", 0, 1}


@dataclass(frozen=True, slots=True)
class PlainModel:
    """A model of one of these families, with what :class:`.built.BuiltModel` gives of any."""

    loader = "AutoModelForCausalLM"
    name: str
    shape: Shape
    defaults: Mapping[str, Any]
    routing: Routing | None = None

    @property
    def path(self) -> str:
        """Place of the layers."""
        return "model.layers"

    @property
    def kinds(self) -> Sequence[object]:
        """All layers are alike."""
        return (None,) * self.shape.num_layers

    def vectors(self) -> Iterator[tuple[str, str]]:
        """The names of the one-dimensional weights, in the order of the modules; stored alike."""
        for index in range(self.shape.num_layers):
            for name in VECTORS[self.shape.model_type]:
                yield (f"{self.path}.{index}.{name}",) * 2
        yield ("model.norm.weight",) * 2

    def mixture(self) -> Mixture:
        """Its routed experts; ModelError if it has none."""
        if self.routing is None:
            raise ModelError(
                f"{self.name} has no layer with routed experts: drop whole layers instead",
                see="experts",
            )
        return Mixture(self.name, self.routing, frozenset(range(self.shape.num_layers)))

    def stored_experts(self, plan: Plan) -> Mapping[int, StoredLayer]:
        """Of layers with routed experts, how a stock loader stores them."""
        if plan.experts is None:
            return {}
        stacks = _MIXTURES[self.shape.model_type][1:]
        heads = frozenset(name.partition(".")[0] for name in stacks)
        lengths = dict.fromkeys(stacks, plan.experts.num_experts)
        return dict.fromkeys(plan.experts.by_layer, StoredLayer(lengths, frozenset(), heads))

    def shortened(self, raw: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        """The JSON of the config for what stays, unknown keys included."""
        before = {**self.defaults, **raw}
        after = SimpleNamespace(**before)
        try:
            if plan.blocks:
                shorten(after, self.shape.num_layers, plan.survivors)
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ModelError(
                f"the config cannot describe the layers {list(plan.survivors)} alone: {error}",
                see="families",
            ) from error
        if plan.experts is not None:
            setattr(after, _MIXTURES[self.shape.model_type][0], plan.experts.num_kept)
        return edit_config(raw, before, vars(after), aliases={})


def plain_model(
    folder: Path, raw: Mapping[str, Any], experts_of: Iterable[str] | None = None
) -> PlainModel | None:
    """The model of a config's JSON; None if it is of no plain family, or unusual in any way.

    ``experts_of`` are the names of its tensors if experts of it will go.
    """
    family = raw.get("model_type")
    total, width, vocabulary = (raw.get(key) for key in _SIZES)
    if not isinstance(family, str) or family not in VECTORS or not folder.name:
        return None
    if not _is_size(total) or not _is_size(width) or not _is_size(vocabulary):
        return None
    lists = _LISTS.get(family, ())
    if any(raw.get(key) for key in _UNUSUAL) or (raw.get("layer_types") and not lists):
        return None
    number = _num_experts(family, raw)
    if number is None:
        return None
    defaults = _defaults(family, total, raw)
    described = {**defaults, **raw}
    for name in lists:
        kinds = described.get(name)
        if not isinstance(kinds, list) or len(kinds) != total:
            return None
        if any(not isinstance(kind, str | int) or kind not in _KINDS for kind in kinds):
            return None
    shape = Shape(family, total, width, vocabulary, number)
    model = PlainModel(Path(title_of(str(folder))).name, shape, defaults)
    if experts_of is None or family not in _MIXTURES:
        return model
    routing = _routing(family, raw, experts_of)
    return None if routing is None else replace(model, routing=routing)


def _routing(family: str, raw: Mapping[str, Any], names: Iterable[str]) -> Routing | None:
    """How tokens are sent to experts; None if these are stored or counted in an unusual way."""
    key, *stacks = _MIXTURES[family]
    inner = re.compile(r"(?:^|\.)layers\.\d+\.(?!self_attn\.|\w*layernorm\.)(.*)")
    parts = {match[1] for name in names if (match := inner.search(name))}
    if any(part not in stacks and not SINGLE_EXPERT.search(part) for part in parts):
        return None
    if not _is_size(raw.get("num_experts_per_tok")):
        return None
    return Routing.of(SimpleNamespace(**raw), raw[key])


def _num_experts(family: str, raw: Mapping[str, Any]) -> int | None:
    """The routed experts of a layer, 0 for none; None if they are counted in an unusual way."""
    if family not in _MIXTURES:
        return 0
    number = raw.get(_MIXTURES[family][0])
    if not _is_size(number) or {"num_experts", "num_local_experts"} <= raw.keys():
        return None
    return number if number > 1 else 0


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
