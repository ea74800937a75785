"""Knowing a model again, whatever the dtype it is loaded in."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils.modeling import align_module_device
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..values.plan import ModelIdentity, fingerprint
from .architecture import find_layers, require_weights, text_config


def identify(model: PreTrainedModel) -> ModelIdentity:
    """The identity of a model as it is now; reads its one-dimensional weights only.

    A float32 checkpoint loaded as float16 is rounded twice, and may count as another model.

    Raises:
        ModelError: the weights are not there.
    """
    require_weights(model)
    return ModelIdentity(
        name=model_name(model),
        model_type=text_config(model).model_type,
        num_layers=len(find_layers(model)),
        dtype=stored_dtype(model),
        fingerprint=fingerprint(shape_of(model), _read_vectors(model)),
    )


def _read_vectors(model: PreTrainedModel) -> Iterator[tuple[str, bytes]]:
    for path, name in vectors_of(model):
        module = model.get_submodule(path)
        with align_module_device(module):
            weight = getattr(module, name).detach().cpu()
        yield f"{path}.{name}", weight.to(torch.bfloat16).view(torch.uint16).numpy().tobytes()


def vectors_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The one-dimensional weights, as the path of a module and the name in it."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                yield path, name


def shape_of(model: PreTrainedModel) -> tuple[str, int, int, int]:
    """Model type, layers, hidden size, vocabulary size."""
    config = text_config(model)
    return config.model_type, len(find_layers(model)), config.hidden_size, config.vocab_size


def stored_digest(path: str | Path) -> str:
    """A hash that tells checkpoints apart whose :func:`identify` is the same, such as a cut and its
    patch: of the names, shapes and first rows of all tensors of safetensors.

    Args:
        path: a folder, or the hub id of a model that was loaded before.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = Path(str(cached_file(str(path), "config.json"))).parent
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                stored = opened.get_slice(name)
                digest.update(repr((name, stored.get_shape(), stored.get_dtype())).encode())
                row = stored[:1] if stored.get_shape() else opened.get_tensor(name)
                digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_name(model: PreTrainedModel) -> str:
    """The name of the folder or repository that a model comes from."""
    return Path(str(text_config(model).name_or_path)).name or type(model).__name__


def stored_dtype(model: PreTrainedModel) -> str:
    """The dtype that the weights are kept in: ``nf4``, ``int8`` or torch's name."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    return str(model.dtype).removeprefix("torch.")
