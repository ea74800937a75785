"""A cut in memory as its source stores it: the source's cut on disk, with what changed laid over.

Towers, heads of more tokens, processors and every file beside the weights stay as the source has
them. So do names, dtypes and the division into files.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .._core import Checkpoint
from ..errors import ModelError, PlanError, raise_output_error
from ..models.architecture import find_layers, layer_parts
from ..models.dtypes import QUANTISED
from ..models.loading import empty_model, loader_with_head
from ..models.offload import changed_weights, is_on_disk, stored_weight
from ..models.place import CONFIG_FILE, read_json
from ..models.source import ModelSource
from ..models.unsaved import Unsaved, unsaved
from ..values.plan import Plan
from .built import as_saved
from .checkpoint import PreparedCut, num_more, prepare
from .checkpoint_files import StoredTensor, is_checkpoint, stored_dtype, stored_tensors
from .source import hub_id, snapshot
from .tensor_names import find_prefix, name_under

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {**_FLOATS, "I64": torch.int64}
"""The dtypes of what may be laid over, by safetensors' words; batch norms count in int64."""

_BLOCK = 1 << 22
"""Values that are compared, and written, at once."""


def source_folder(model: PreTrainedModel) -> Path | None:
    """Find the folder of plain safetensors that a model was loaded from, if it is here."""
    named = str(model.name_or_path)
    is_gguf = str(model.config.name_or_path).endswith(".gguf")
    if not named or is_gguf or getattr(model.config, "quantization_config", None) is not None:
        return None
    folder: Path | None = Path(named).expanduser()
    if folder and not folder.is_dir():
        hub = hub_id(named)
        folder = snapshot(hub) if hub else None
    return folder if folder and is_checkpoint(folder) else None


def require_whole(model: PreTrainedModel, text_only: bool = False) -> None:
    """Refuse a model that is not saved whole, or whose text has no class alone: ModelError."""
    if text_only:
        if loader_with_head(model.config) is not AutoModelForCausalLM:
            raise ModelError("its text has no class of its own: leave out text_only (--text-only)")
        return
    lost = Unsaved()
    with suppress(ModelError):  # the folder that it names is another one now
        lost = not_saved(model)
    if lost:
        raise ModelError(
            f"transformers loads {model.name_or_path} without {lost}, which the saved model would "
            f"lack: cut it as it is stored (shallower prune, without --dtype), or leave them out "
            f"on purpose (text_only, --text-only)"
        )


def not_saved(model: PreTrainedModel | ModelSource, text_only: bool = False) -> Unsaved:
    """The stored tensors that would not be in what is saved of a whole model, by their prefixes.

    Those that transformers does not load, where no cut can be laid over its source, or is not to.
    """
    lost = unsaved(model)
    if not lost or text_only or (isinstance(model, ModelSource) and model.dtype in QUANTISED):
        return lost
    if isinstance(model, ModelSource):
        place = str(model.place.expanduser())
        model = empty_model(place, model.trust_remote_code)
        model.name_or_path = place
    return Unsaved() if _is_alike(model) else lost


def _is_alike(model: PreTrainedModel) -> bool:
    """Whether every weight of a whole model is stored in its source, and layers are all apart."""
    folder = source_folder(model)
    if folder is None or layer_parts(model, find_layers(model)):
        return False
    with suppress(ModelError):
        _places(model, folder, num_more(read_json(folder / CONFIG_FILE)))
        return True
    return False


def narrower_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The dtype in which the checkpoint of a model is stored, if that has fewer bits."""
    folder = source_folder(model)
    stored = None if folder is None else stored_dtype(folder)
    dtypes = (one for one in _FLOATS.values() if str(one) == f"torch.{stored}")
    return next((one for one in dtypes if one.itemsize < model.dtype.itemsize), None)


def cut_as_stored(model: PreTrainedModel, plan: Plan, trusted: bool) -> PreparedCut | None:
    """Lay out the cut of the checkpoint that a model was loaded from; None where there is none."""
    folder = source_folder(model)
    if folder is None:
        return None
    with suppress(ModelError, PlanError):  # it is cut in memory only
        return prepare(folder, plan, trust_remote_code=trusted)
    return None


def write_as_stored(cut: PreparedCut, model: PreTrainedModel, folder: Path) -> bool:
    """Write a cut into an empty folder, and lay over it the weights of a model that differ.

    A weight differs if the stored one, in the model's dtype, is another. It is rounded to the
    stored dtype. False, and the folder empty, where a weight is not stored in its own shape.
    """
    try:
        cut.fill(folder, False)
        find = _places(model, folder, cut.num_more)
    except ModelError:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return False
    for part in _parts(model):
        for name, value in as_saved(model, part).items():
            if (stored := find(name, value)) is not None:
                _write(value, stored)
    return True


def _places(
    model: PreTrainedModel, folder: Path, num_more: int
) -> Callable[[str, torch.Tensor], StoredTensor | None]:
    """Give what finds where a weight lies in a checkpoint, by the name that it is saved under.

    None where another stands for it. ModelError, at once for all of the model: one is not stored,
    in another shape, or not as plain values.
    """
    saved = as_saved(model, {name: one.to("meta") for name, one in model.state_dict().items()})
    stored, found = stored_tensors(Checkpoint(folder)), find_layers(model)
    ours = find_prefix(saved, found.path, len(found))
    theirs = find_prefix(stored, found.path, len(found), num_more=num_more)
    tied = getattr(model, "all_tied_weights_keys", {})

    def find(name: str, value: torch.Tensor) -> StoredTensor | None:
        there = stored.get(name) or stored.get(name_under(name, ours, theirs))
        if there is None and name not in tied:
            raise ModelError(f"{folder} does not store {name}")
        kept = _FLOATS if value.is_floating_point() else _DTYPES.keys() - _FLOATS
        if there and (there.shape != [*value.shape] or there.dtype not in kept):
            raise ModelError(
                f"{folder} stores {name} as {there.dtype} of shape {there.shape}, and in memory it "
                f"has the shape {[*value.shape]}"
            )
        return there

    for name, tensor in saved.items():
        find(name, tensor)
    return find


def _parts(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of a model, those of a layer together; of a layer on disk only if any changed."""
    path, modules = f"{find_layers(model).path}.", dict(model.named_modules())
    groups: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in model.state_dict().items():
        inside = name.startswith(path)
        groups[name.removeprefix(path).partition(".")[0] if inside else ""][name] = tensor
    for number, group in groups.items():
        layer = modules.get(path + number)
        if layer is None or not is_on_disk(layer) or changed_weights(layer):
            yield {name: _value(modules, name, tensor) for name, tensor in group.items()}


def _value(modules: Mapping[str, nn.Module], name: str, tensor: torch.Tensor) -> torch.Tensor:
    path, _, own = name.rpartition(".")
    return stored_weight(modules[path], own) if tensor.is_meta else tensor


def _write(value: torch.Tensor, stored: StoredTensor) -> None:
    """Write a weight where it is stored, block by block, as far as it is another one there."""
    path, start, _ = stored.piece
    values, dtype = value.detach().reshape(-1), _DTYPES[stored.dtype]
    old = torch.empty(min(_BLOCK, len(values)), dtype=dtype)
    with raise_output_error(path), path.open("r+b") as file:
        for part in values.split(_BLOCK) if len(values) else ():
            there, part = old[: len(part)], part.cpu()
            file.seek(start)
            file.readinto(_bytes_of(there))
            if not torch.equal(there.to(part.dtype), part):
                file.seek(start)
                file.write(_bytes_of(part.to(dtype)))
            start += there.nbytes


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data
