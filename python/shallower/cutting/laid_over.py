"""A cut in memory as its source stores it: the source's cut on disk, with what changed laid over.

Towers, heads of more tokens, processors and every file beside the weights stay as the source has
them. So do names, dtypes and the division into files.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file

from .._core import Checkpoint
from ..errors import ModelError, PlanError, raise_output_error, why
from ..models.architecture import find_layers, layer_parts
from ..models.dtypes import QUANTISED
from ..models.loading import empty_model
from ..models.offload import changed_weights, is_on_disk, stored_weight
from ..models.place import CONFIG_FILE, read_json
from ..models.source import ModelSource
from ..models.unsaved import Unsaved, unsaved
from ..values.plan import Plan
from .checkpoint import PreparedCut, num_more, prepare
from .checkpoint_files import StoredTensor, is_checkpoint, stored_dtype, stored_tensors
from .tensor_names import find_prefix, name_under
from .twin import BUILDING_ERRORS

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of weights that may be laid over, by safetensors' words."""

_BLOCK = 1 << 22
"""Values that are compared, and written, at once."""


def source_folder(model: PreTrainedModel) -> Path | None:
    """Find the folder of plain safetensors that a model was loaded from, if it is here."""
    named = str(model.name_or_path)
    is_gguf = str(model.config.name_or_path).endswith(".gguf")
    if not named or is_gguf or getattr(model.config, "quantization_config", None) is not None:
        return None
    if not Path(named).expanduser().is_dir():
        try:
            named = str(Path(str(cached_file(named, CONFIG_FILE, local_files_only=True))).parent)
        except (OSError, ValueError):  # transformers raises them for what is not here
            return None
    return Path(named).expanduser() if is_checkpoint(named) else None


def require_whole(model: PreTrainedModel) -> None:
    """Refuse a model of which stored tensors would not be in what is saved of it: ModelError."""
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
    try:
        _Places(model, folder, num_more(read_json(folder / CONFIG_FILE)))
    except ModelError:
        return False
    return True


def narrower_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The dtype in which the checkpoint of a model is stored, if that has fewer bits."""
    folder = source_folder(model)
    stored = None if folder is None else stored_dtype(folder)
    dtypes = (one for one in _DTYPES.values() if str(one) == f"torch.{stored}")
    return next((one for one in dtypes if one.itemsize < model.dtype.itemsize), None)


def cut_as_stored(model: PreTrainedModel, plan: Plan, trusted: bool) -> PreparedCut | None:
    """Lay out the cut of the checkpoint that a model was loaded from; None where there is none."""
    folder = source_folder(model)
    if folder is None:
        return None
    try:
        return prepare(folder, plan, trust_remote_code=trusted)
    except (ModelError, PlanError):  # it is cut in memory only
        return None


def write_as_stored(cut: PreparedCut, model: PreTrainedModel, folder: Path) -> bool:
    """Write a cut into an empty folder, and lay over it the weights of a model that differ.

    A weight differs if the stored one, in the model's dtype, is another. It is rounded to the
    stored dtype. False, and the folder empty, where a weight is not stored in its own shape.
    """
    try:
        cut.fill(folder, False)
        places = _Places(model, folder, cut.num_more)
    except ModelError:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return False
    for part in _parts(model):
        for name, value in _as_saved(model, part).items():
            if (stored := places.find(name)) is not None:
                _write(value, stored)
    return True


class _Places:
    """Where the weights of a model lie in a checkpoint, by the names that they are saved under."""

    def __init__(self, model: PreTrainedModel, folder: Path, num_more: int) -> None:
        empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        saved = _as_saved(model, empty)
        self._stored = stored_tensors(Checkpoint(folder))
        found = find_layers(model)
        self._ours = find_prefix(saved, found.path, len(found))
        self._theirs = find_prefix(self._stored, found.path, len(found), num_more=num_more)
        tied = getattr(model, "all_tied_weights_keys", {})
        for name, tensor in saved.items():
            stored = self.find(name)
            if stored is None and name not in tied:
                raise ModelError(f"{folder} does not store {name}")
            if stored and (stored.shape != [*tensor.shape] or stored.dtype not in _DTYPES):
                raise ModelError(
                    f"{folder} stores {name} as {stored.dtype} of shape {stored.shape}, and in "
                    f"memory it has the shape {[*tensor.shape]}"
                )

    def find(self, name: str) -> StoredTensor | None:
        """Where a weight lies by the name that it is saved under; None where it has no place."""
        other = name_under(name, self._ours, self._theirs)
        return self._stored.get(name) or self._stored.get(other)


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


def _as_saved(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weights by the names, and in the pieces, that they were loaded from."""
    try:
        return dict(revert_weight_conversion(model, dict(tensors)))
    except (*BUILDING_ERRORS, NotImplementedError) as error:
        kind = type(model).__name__
        raise ModelError(f"transformers cannot name what {kind} stores: {why(error)}") from error


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
