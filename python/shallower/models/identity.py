"""The identity of a model, the same in whatever dtype it is loaded.

It is made of what no quantiser changes: the shape, and one-dimensional weights in bfloat16. So a
plan made on the NF4 model fits the bfloat16 one.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils.modeling import align_module_device
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..values.identity import ModelIdentity, Shape, fingerprint, title_of
from .architecture import DecoderLayers, find_layers, require_weights, text_config
from .experts import num_experts
from .offload import stored_weight
from .structure import is_plain, structure_of


def identify(model: PreTrainedModel, layers: DecoderLayers | None = None) -> ModelIdentity:
    """Find the identity of a model as it is now; reads its one-dimensional weights only.

    A float32 checkpoint loaded as float16 is rounded twice, and may count as another model.
    """
    require_weights(model)
    shape = shape_of(model, layers)
    return ModelIdentity(
        name=model_name(model),
        model_type=shape.model_type,
        num_layers=shape.num_layers,
        dtype=stored_dtype(model),
        fingerprint=fingerprint(shape, _read_vectors(model)),
    )


def _read_vectors(model: PreTrainedModel) -> Iterator[tuple[str, bytes]]:
    for path, name in vectors_of(model):
        module = model.get_submodule(path)
        with align_module_device(module):
            weight = getattr(module, name).detach().cpu()
        yield f"{path}.{name}", weight.to(torch.bfloat16).view(torch.uint16).numpy().tobytes()


def vectors_of(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Find the one-dimensional weights of a model: a module's path, and the name there.

    Of a model that has towers beside its decoder, the decoder's.
    """
    runner = find_layers(model).runner
    inner = next(path for path, module in model.named_modules() if module is runner)
    of, prefix = (runner, inner) if "." in inner else (model, "")
    for path, module in of.named_modules(prefix=prefix):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                yield path, name


def shape_of(model: PreTrainedModel, layers: DecoderLayers | None = None) -> Shape:
    """The sizes of a model, for the fingerprint; ModelError without a list of decoder layers."""
    config = text_config(model)
    count = len(layers if layers is not None else find_layers(model))
    return Shape(
        config.model_type, count, config.hidden_size, config.vocab_size, num_experts(config)
    )


def stored_digest(path: str | Path) -> str:
    """SHA-256, in hex, of the names, shapes and first rows of all tensors of a checkpoint.

    Distinguishes checkpoints whose :func:`identify` is the same, such as a cut and its patch. The
    path is a folder with safetensors, or the hub id of a model that was loaded before.
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


def weights_hash(model: PreTrainedModel, *, reads: bool = False) -> str | None:
    """SHA-256, in hex, of all that a model computes by, without its place.

    None where weights are offloaded, unless it ``reads`` them, one by one; or where the model has
    hooks or code as :func:`structure_of`.
    """
    structure = structure_of(model)
    if structure is None or not all(map(is_plain, model.parameters())):
        return None
    digest = hashlib.sha256(structure.encode())
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta and reads:
            path, _, own = name.rpartition(".")
            tensor = stored_weight(model.get_submodule(path), own)
        if tensor.is_meta:
            return None
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_name(model: PreTrainedModel) -> str:
    """The folder or repository name that a model comes from, or the name of its class."""
    return Path(title_of(str(text_config(model).name_or_path))).name or type(model).__name__


def stored_dtype(model: PreTrainedModel) -> str:
    """The dtype that weights are kept in: ``nf4``, ``int8`` or torch's, such as ``bfloat16``."""
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    return str(model.dtype).removeprefix("torch.")
