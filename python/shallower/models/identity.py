"""Knowing a model again, whatever the dtype it is loaded in."""

import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..artifacts import ModelIdentity
from .architecture import find_layers, text_config


def identify(model: PreTrainedModel) -> ModelIdentity:
    """The identity of a model as it is now; reads its one-dimensional weights only."""
    config = text_config(model)
    num_layers = len(find_layers(model))
    digest = hashlib.sha256()
    shape = (config.model_type, num_layers, config.hidden_size, config.vocab_size)
    digest.update(repr(shape).encode())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and parameter.device.type != "meta":
            bits = parameter.detach().to(torch.bfloat16).cpu().view(torch.uint16).numpy()
            digest.update(name.encode() + bits.tobytes())
    return ModelIdentity(
        name=Path(str(config.name_or_path)).name or type(model).__name__,
        model_type=config.model_type,
        num_layers=num_layers,
        dtype=stored_dtype(model),
        fingerprint=digest.hexdigest(),
    )


def stored_dtype(model: PreTrainedModel) -> str:
    """The dtype that the weights are kept in: ``nf4``, ``int8`` or torch's name."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    return str(model.dtype).removeprefix("torch.")
