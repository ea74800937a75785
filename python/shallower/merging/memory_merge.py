"""Adapters merged in memory, for weights that are not stored one by one as safetensors.

The whole model in float32, by peft itself: large and slow. ``merging`` does without wherever it
can.
"""

import copy
from pathlib import Path

import torch

from ..errors import ModelError
from ..models.architecture import find_layers, input_device
from ..models.source import ModelSource
from ..values.healing import Healing
from .in_memory import probe_logits, require_same_model, with_adapters
from .low_rank import exact_products


def merge_in_memory(
    folder: Path, source: ModelSource, adapters: Path, *, healing: Healing
) -> torch.Tensor:
    """Fold adapters into a whole model, float32 sums each rounded once, and save it.

    Args:
        folder: the folder to fill.
        source: the cut, in the dtype that it is stored in.
        adapters: the folder of the adapters.
        healing: their record.

    Returns:
        The logits of the adapters on the model, (1, T, V) float32.

    Raises:
        ModelError: the adapters are not this model's, or hold NaN.
    """
    model, tokenizer = source.load()
    require_same_model(model, str(source), adapters, healing=healing)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    config_dtype = copy.copy(model.config.dtype)
    device = input_device(find_layers(model))
    adapted = with_adapters(model.float(), adapters)
    expected = probe_logits(adapted, tokenizer, device)
    try:
        with exact_products():
            merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"cannot merge the adapters in {adapters}: {error}") from error
    for name, value in merged.state_dict().items():
        owner, _, key = name.rpartition(".")
        if value.dtype != dtypes[name]:
            getattr(merged.get_submodule(owner), key).data = value.to(dtypes[name])
    merged.config.dtype = config_dtype
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(merged).pop(attribute, None)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return expected
