"""The bytes of a checkpoint before it is made."""

from collections.abc import Collection

from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.architecture import find_layers
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from .rehearsal import build_empty
from .weights import module_bytes, num_parameters, weight_bytes

BESIDE = 1 << 23
"""Bytes of what lies beside the weights of a checkpoint, as its tokenizer, about."""


def left_bytes(model: ModelSource | PreTrainedModel, dropped: Collection[int] | int) -> int:
    """Count the bytes of a checkpoint without some layers, or so many of the smallest.

    Of a model of a family that cannot be built from its config only what lies beside the weights.
    """
    if isinstance(model, ModelSource):
        source = model.resolved()
        try:
            built = build_empty(source.read_config(), plain_dtype(source.dtype))
        except ModelError:
            return BESIDE
        whole = weight_bytes(built, source.dtype)
    else:
        built, whole = model, module_bytes(model)
    sizes = [num_parameters(layer) for layer in find_layers(built).modules]
    gone = sorted(sizes)[:dropped] if isinstance(dropped, int) else [sizes[i] for i in dropped]
    return BESIDE + round(whole * (1 - sum(gone) / num_parameters(built)))
