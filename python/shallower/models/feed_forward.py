"""The linear maps of a decoder's feed-forward parts, found by the names and classes on their way.

Healing adapts them; ``tests/models/test_feed_forward.py`` holds the words against every family.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from .architecture import find_layers

FEED_FORWARD_NAMES = re.compile(
    r"mlps?|mlp_block|ffn|ff|feed_forward|block_sparse_moe|moe|intermediate|output|fc1|fc2"
)
"""Modules in a layer that are its feed-forward part, or the linear maps of it, by name."""

FEED_FORWARD_CLASSES = re.compile(r"MLP|Mlp|FeedForward|FFN|MoE|Moe|Experts")
"""The same by class, where names do not show it: NemotronH calls every part a mixer."""

ATTENTION_NAMES = re.compile(r"\w*(attn|attention)|self_att|temporal_block")
ATTENTION_CLASSES = re.compile(r"Attention$|MLA$|DeltaNet$")

OTHER_NAMES = re.compile(
    r"gate|router|shared_expert_gate|\w*norm|\w*adapter\w*|\w*mamba\w*|\w*indexer|compressor"
    r"|\w*conv\w*|\w*sconv|ple|\w*hyper_connection|\w*_hc|\w*message_\w+|sink_proj|\w*position_bias"
)
"""Modules that decide, scale or mix beside the linear maps: never adapted."""

OTHER_CLASSES = re.compile(r"Router|Gating|Norm$|Adapter|Mamba|Indexer|Rglru|RecurrentBlock$")


@dataclass(frozen=True, slots=True)
class Targets:
    """The weights that low-rank adapters are put on, by full name in the model."""

    modules: tuple[str, ...]  # linear maps, quantised or not
    parameters: tuple[str, ...]  # maps of several experts, (experts, in, out) or so
    transposed: bool  # the linear maps keep (in, out), as GPT-2's do

    def __len__(self) -> int:
        return len(self.modules) + len(self.parameters)


def feed_forward_targets(model: nn.Module, attention: bool = False) -> Targets:
    """Find the linear maps of each layer's feed-forward part, with ``attention`` its own, too.

    Routers, gates of experts, and whatever mixes tokens stay as they are.
    """
    layers = find_layers(model)
    modules: list[str] = []
    parameters: list[str] = []
    for name, module in model.named_modules():
        if not name.startswith(layers.path + "."):
            continue
        number, _, inner = name.removeprefix(layers.path + ".").partition(".")
        if not inner or not _is_target(layers.modules[int(number)], inner, attention):
            continue
        if is_linear(module):
            modules.append(name)
        else:
            parameters += [f"{name}.{key}" for key in _expert_weights(module)]
    if not modules and not parameters:
        raise ModelError(
            f"no feed-forward part was found in the layers of {type(model).__name__}"
            + ("" if attention else ": take the attention as well (attention=True, --attention)")
        )
    _check_unshared(model, {*(f"{name}.weight" for name in modules), *parameters})
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in modules)
    return Targets(tuple(modules), tuple(parameters), transposed)


def _check_unshared(model: nn.Module, targets: set[str]) -> None:
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for group in names.values():
        if len(group) > 1 and targets & set(group):
            raise ModelError(
                f"{group[0]} and {group[1]} are one weight, which adapters of single layers would "
                f"part: {type(model).__name__} cannot be healed"
            )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map: of torch, GPT-2's, or one of a quantiser's."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return not any(True for _ in module.children()) and all(isinstance(s, int) for s in sizes)


def _is_target(layer: nn.Module, path: str, attention: bool) -> bool:
    steps = list(_steps(layer, path))
    if any(OTHER_NAMES.fullmatch(name) or OTHER_CLASSES.search(kind) for name, kind in steps):
        return False
    if any(ATTENTION_NAMES.fullmatch(n) or ATTENTION_CLASSES.search(kind) for n, kind in steps):
        return attention
    return any(
        FEED_FORWARD_NAMES.fullmatch(name) or FEED_FORWARD_CLASSES.search(kind)
        for name, kind in steps
    )


def _steps(layer: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """The names and classes of the modules from a layer, which is left out, to one in it."""
    module: Any = layer
    for name in path.split("."):
        module = getattr(module, name)
        yield name, type(module).__name__


def _expert_weights(module: nn.Module) -> Iterator[str]:
    """The weights in a module that hold the maps of several experts.

    DBRX's are of two dimensions, and read by the module around them: no adapter would reach them.
    """
    for name, weight in module.named_parameters(recurse=False):
        if weight.ndim == 3 and weight.shape[1] > 1:
            yield name
