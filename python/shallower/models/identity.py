"""Knowing a model again, whatever the dtype it is loaded in."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils.modeling import align_module_device
from transformers import PreTrainedModel

from ..artifacts import ModelIdentity
from .architecture import find_layers, require_weights, text_config


def identify(model: PreTrainedModel) -> ModelIdentity:
    """The identity of a model as it is now; reads its one-dimensional weights only.

    A float32 checkpoint loaded as float16 is rounded twice, and may count as another model.

    Raises:
        ModelError: the weights are not there.
    """
    require_weights(model)

    def read(path: str, name: str) -> torch.Tensor:
        module = model.get_submodule(path)
        with align_module_device(module):
            return getattr(module, name).detach().cpu()

    return _identity(model, read, stored_dtype(model))


def identify_stored(
    model: PreTrainedModel, read: Callable[[str], torch.Tensor], dtype: str
) -> ModelIdentity:
    """The identity of a checkpoint that is not loaded: the one of the model once it is.

    Args:
        model: the model of its config, on the meta device.
        read: gives a weight by the name that it has in the model.
        dtype: what the weights are stored in.
    """
    return _identity(model, lambda path, name: read(f"{path}.{name}"), dtype)


def _identity(
    model: PreTrainedModel, read: Callable[[str, str], torch.Tensor], dtype: str
) -> ModelIdentity:
    config = text_config(model)
    num_layers = len(find_layers(model))
    digest = hashlib.sha256()
    shape = (config.model_type, num_layers, config.hidden_size, config.vocab_size)
    digest.update(repr(shape).encode())
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                bits = read(path, name).to(torch.bfloat16).view(torch.uint16).numpy()
                digest.update(f"{path}.{name}".encode() + bits.tobytes())
    return ModelIdentity(
        name=Path(str(config.name_or_path)).name or type(model).__name__,
        model_type=config.model_type,
        num_layers=num_layers,
        dtype=dtype,
        fingerprint=digest.hexdigest(),
    )


def stored_dtype(model: PreTrainedModel) -> str:
    """The dtype that the weights are kept in: ``nf4``, ``int8`` or torch's name."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    return str(model.dtype).removeprefix("torch.")
