"""The bytes of a model's weights by dtype, as loaded, and of a checkpoint before it is made."""

import math
from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from ..errors import ModelError
from ..models.architecture import find_layers
from ..models.dtypes import QUANTISED, plain_dtype
from ..models.experts import stacked_weights
from ..models.source import ModelSource
from ..values.estimates import EXPERTS
from .rehearsal import build_empty

BESIDE = 1 << 23
"""Bytes of what lies beside the weights of a checkpoint, as its tokenizer, about."""

_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a scale in bitsandbytes' 4 bits; scales that share one themselves."""

_NF4_TABLES = 4 * (16 + 256 + 1)
"""The values of the 16 codes, of the scales' 256, and the scales' mean, in float32."""


def weight_bytes(model: PreTrainedModel, dtype: str) -> int:
    """Bytes of a model's weights and buffers as loaded in a dtype, shared ones once.

    In ``nf4`` and ``int8`` of bitsandbytes, embeddings, head and norms are bfloat16.
    """
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return sum(stored_bytes(model, dtype).values()) + buffers


def weight_parts(model: PreTrainedModel, dtype: str) -> dict[str, int]:
    """Count :func:`weight_bytes` by what they are of, routed experts apart where there are any."""
    stored = stored_bytes(model, dtype)
    experts = sum(stored[weight] for weight in stacked_weights(model))
    rest = {"weights": weight_bytes(model, dtype) - experts}
    return {**rest, EXPERTS: experts} if experts else rest


def stored_bytes(model: PreTrainedModel, dtype: str) -> dict[nn.Parameter, int]:
    """Count the bytes of each of a model's weights, as :func:`weight_bytes`."""
    size = 4 if dtype == "float32" else 2
    found = {weight: weight.numel() * size for weight in model.parameters()}
    if dtype in QUANTISED:
        for module in _quantised(model):
            found[_weight(module)] = _quantised_bytes(module, dtype)
    return found


def module_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's weights as they are; shared ones once."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def num_parameters(module: nn.Module) -> int:
    """Count the values of a module's weights before they are quantised; shared ones once."""
    return sum(
        # bitsandbytes puts two values of 4 bits in a byte
        weight.numel() if state is None else math.prod(state.shape)
        for weight in module.parameters()
        for state in (getattr(weight, "quant_state", None),)
    )


def left_bytes(model: ModelSource | PreTrainedModel, dropped: Collection[int] | int) -> int:
    """Count the bytes of a checkpoint without some layers, or so many of the smallest.

    With what its source stores beside the weights that are loaded, as towers. Of a family that
    cannot be built from its config only what lies beside the weights.
    """
    beside = BESIDE
    if isinstance(model, ModelSource):
        source = model.resolved()
        try:
            config = source.read_config()
            built = build_empty(config, plain_dtype(source.dtype))
        except ModelError:
            return BESIDE
        whole = weight_bytes(built, source.dtype)
        if not source.is_gguf:
            stored = getattr(config.dtype, "itemsize", source.stored_bytes) * num_parameters(built)
            beside += max(0, source.stored_bytes - stored)
    else:
        built, whole = model, module_bytes(model)
    sizes = [num_parameters(layer) for layer in find_layers(built).modules]
    gone = sorted(sizes)[:dropped] if isinstance(dropped, int) else [sizes[i] for i in dropped]
    return beside + round(whole * (1 - sum(gone) / num_parameters(built)))


def dequantised_bytes(model: PreTrainedModel, dtype: str) -> int:
    """Bytes of the largest quantised weight in bfloat16, as it is multiplied; 0 for plain ones."""
    if dtype not in QUANTISED:
        return 0
    return max((2 * _weight(module).numel() for module in _quantised(model)), default=0)


def _quantised(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose weights bitsandbytes quantises, as transformers chooses them."""
    kept = get_keys_to_not_convert(model)
    found: list[nn.Module] = [
        module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and not any(name == one or name.startswith(f"{one}.") for one in kept)
    ]
    return found


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _quantised_bytes(module: nn.Module, dtype: str) -> int:
    weight = _weight(module)
    count = weight.numel()
    if dtype == "int8":
        outputs = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
        return count + 4 * outputs
    scales = -(-count // _BLOCK)
    return -(-count // 2) + scales + 4 * -(-scales // _NESTED_BLOCK) + _NF4_TABLES
