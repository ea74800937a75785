"""The routed experts of a model: where they are, and what its config says of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ModelError
from ..values.estimates import format_size
from ..values.experts import Routing
from .architecture import DecoderLayers, find_layers, text_config

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The keys by which configs count the routed experts of a layer, other names for them included."""


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The routed experts of one layer, in stacked weights with the experts first."""

    layer: int
    path: str  # of their module in the layer, such as `mlp.experts`
    module: nn.Module
    num_experts: int

    @property
    def block(self) -> str:
        """The path of the module around router and experts; empty for the layer itself."""
        return self.path.rpartition(".")[0]


def find_experts(
    model: nn.Module, layers: DecoderLayers | None = None
) -> tuple[RoutedExperts, ...]:
    """Find the routed experts of a model, with weights or on the meta device, by layer.

    ModelError where they are no stacked weights, or of other numbers in other layers.
    """
    layers = find_layers(model) if layers is None else layers
    found = []
    for index, layer in enumerate(layers.modules):
        several = list(_stacks(layer))
        if len(several) > 1:
            raise ModelError(
                f"layer {index} of {type(model).__name__} has experts in "
                f"{' and '.join(path for path, _, _ in several)}: expected one mixture a layer"
            )
        found += [RoutedExperts(index, *one) for one in several]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layer with routed experts in stacked weights: drop "
            f"whole layers instead",
            see="experts",
        )
    if len({one.num_experts for one in found}) > 1:
        raise ModelError(
            f"the layers of {type(model).__name__} have other numbers of experts, "
            f"{', '.join(str(one.num_experts) for one in found)}: expected one"
        )
    return tuple(found)


def _stacks(layer: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """The modules in a layer, or a model, that hold experts in stacks, and their number."""
    for path, module in layer.named_modules():
        kind = type(module).__name__
        if not path or not kind.endswith("Experts") or "shared" in path:
            continue
        count = getattr(module, "num_experts", None) or getattr(module, "moe_num_experts", None)
        inner = getattr(module, "mlp", module)  # DBRX's weights lie in a module of their own
        weights = [weight for _, weight in inner.named_parameters(recurse=False)]
        if isinstance(count, int) and weights and all(w.shape[0] % count == 0 for w in weights):
            yield path, module, count


def stacked_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of routed experts in stacks; quantisers of linear maps leave them as they are."""
    return [weight for _, module, _ in _stacks(model) for weight in module.parameters()]


def unquantised(dtype: str, size: int) -> str:
    """Say that the stacks of experts, of so many bytes, stay plain where all else is quantised."""
    return (
        f"{dtype} quantises linear maps alone: the routed experts, {format_size(size)}, are stacks "
        f"and stay in bfloat16"
    )


def count_keys(config: Any, num_experts: int) -> list[tuple[Any, str]]:
    """The configs, and the keys in them, that count the routed experts; under their own names."""
    config = getattr(config, "ffn_config", config)
    aliases = getattr(type(config), "attribute_map", {})
    names = dict.fromkeys(aliases.get(name, name) for name in COUNTS)
    return [(config, name) for name in names if getattr(config, name, None) == num_experts]


def num_experts(decoder: Any) -> int:
    """The number of routed experts that a decoder's config counts in a layer; 0 for none."""
    inner = getattr(decoder, "ffn_config", decoder)
    counts = [getattr(inner, name, None) for name in COUNTS]
    return next((count for count in counts if type(count) is int and count > 1), 0)


def counted_experts(config: Any) -> int:
    """Count the routed experts of a layer by a model's config; ModelError if it counts none."""
    decoder = config.get_text_config(decoder=True)
    if count := num_experts(decoder):
        return count
    raise ModelError(
        f"the config of {decoder.model_type} counts no routed experts: drop whole layers instead",
        see="experts",
    )


def routing_of(model: nn.Module, num_experts: int) -> Routing:
    """Read from a model's config how tokens are sent to experts; ModelError as :class:`Routing`."""
    return Routing.of(text_config(model), num_experts)
