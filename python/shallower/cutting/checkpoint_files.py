"""The files of a checkpoint: config, what is carried over, and how much its weights are."""

import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ModelError
from ..models.dtypes import stored_quantisation
from ..models.place import CONFIG_FILE, read_json
from ..values.files import OF_ONE_MODEL
from ..values.layers import MAX_LAYERS
from .exports import EXPORT_FILES
from .source import MAX_CARRIED_BYTES, module_folders

if TYPE_CHECKING:
    from .._core import Checkpoint

QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

_PLAIN = {"F64", "F32", "F16", "BF16"}
"""Dtypes whose values are parameters as they stand."""

_WEIGHTS = (SINGLE_FILE, INDEX_FILE)
_OTHER_WEIGHTS = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".tflite",
    ".pkl",
    ".pickle",
)
_NOT_CARRIED = {CONFIG_FILE, "params.json", "job", *EXPORT_FILES, *OF_ONE_MODEL}
"""Rewritten here, the layer count of another format, or of that model alone."""
TEMPLATES_FOLDER = "additional_chat_templates"


class Piece(NamedTuple):
    """Adjacent bytes of a file of weights: the first one, and the one past the last."""

    path: Path
    start: int
    stop: int


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint: its dtype in safetensors' words, its shape and its bytes."""

    dtype: str
    shape: list[int]
    piece: Piece


def stored_tensors(stored: "Checkpoint") -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by their names."""
    found: dict[str, StoredTensor] = {}
    begun: dict[Path, int] = {}  # by the tensors behind, which follow each other without gaps
    for name, dtype, shape, path, start in reversed(stored.tensors()):
        stop = begun.get(path) or path.stat().st_size
        found[name] = StoredTensor(dtype, shape, Piece(path, start, stop))
        begun[path] = start
    return dict(reversed(found.items()))


def is_checkpoint(path: str | Path) -> bool:
    """Whether a local folder holds a config and safetensors."""
    folder = Path(path).expanduser()
    weights = any((folder / name).is_file() for name in _WEIGHTS)
    return weights and (folder / CONFIG_FILE).is_file()


def stored_dtype(path: str | Path) -> str:
    """The dtype in a folder's config, as torch's or the quantisation's name; else ``unknown``."""
    return config_dtype(read_json(Path(path).expanduser() / CONFIG_FILE))


def config_dtype(raw: Mapping[str, Any]) -> str:
    """:func:`stored_dtype` of the JSON of a config."""
    quantised = raw.get("quantization_config")
    if isinstance(quantised, dict):
        return str(stored_quantisation(quantised))
    return str(raw.get("dtype") or raw.get("torch_dtype") or "unknown").removeprefix("torch.")


def needs_transformers_5(raw: Mapping[str, Any]) -> bool:
    """Whether a config has ``rope_parameters``, which transformers 4 ignores."""
    version = str(raw.get("transformers_version") or "").partition(".")[0]
    return (version.isdecimal() and int(version) >= 5) or "rope_parameters" in raw


def text_part(raw: Mapping[str, Any], model_type: str) -> str | None:
    """The key of a config under which a model is described that a stock loader builds alone."""
    found = (name for name in ("text_config", "thinker_config") if isinstance(raw.get(name), dict))
    return next(found, None) if raw.get("model_type") != model_type else None


def read_config(path: Path) -> dict[str, Any]:
    """Read the config of a checkpoint, whose weights must be named ``model.safetensors``."""
    raw = read_json(path)
    if raw.get("transformers_weights"):
        raise ModelError(
            f"{CONFIG_FILE} places the weights in {raw['transformers_weights']!r}: expected "
            f"{' or '.join(_WEIGHTS)}, name them so and remove transformers_weights"
        )
    count = raw.get("num_hidden_layers")
    if isinstance(count, int) and count > MAX_LAYERS:
        raise ModelError(f"{path} counts {count} layers: expected at most {MAX_LAYERS}")
    return raw


def is_beside(name: str, modules: Collection[str] = ()) -> bool:
    """Whether a file lies beside the weights, or those of an embedder's subfolders ``modules``."""
    folder, _, inner = name.rpartition("/")
    is_weights = inner.endswith(_OTHER_WEIGHTS) and folder not in modules
    return name[:1] != "." and folder in ("", TEMPLATES_FOLDER, *modules) and not is_weights


def carried_files(stored: "Checkpoint") -> Iterator[tuple[str, Path]]:
    """The files beside the weights that belong to the model: tokenizer, templates, code."""
    modules = module_folders(stored.folder)
    for entry in sorted(stored.folder.iterdir()):
        names = [entry.name]
        if entry.is_dir():
            inner = entry.iterdir() if entry.name in {TEMPLATES_FOLDER, *modules} else ()
            names = sorted(f"{entry.name}/{file.name}" for file in inner)
        for name in names:
            if entry.name in _NOT_CARRIED or not is_beside(name, modules):
                continue
            try:
                path = stored.resolve(name)
            except ModelError as error:
                warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                continue
            if path.stat().st_size > MAX_CARRIED_BYTES:
                warnings.warn(f"{name} is left out: it is too large", stacklevel=2)
                continue
            yield name, path


def stored_bytes(place: Path) -> int | None:
    """Count the bytes of the weights at a place, a folder or a file; None if none are there."""
    try:
        if place.is_file():
            return place.stat().st_size
        sizes = [
            path.stat().st_size
            for pattern in ("*.safetensors", "pytorch_model*.bin")
            for path in place.glob(pattern)
        ]
    except OSError:
        return None
    return sum(sizes) or None


def count_weights(place: Path) -> tuple[int | None, int] | None:
    """Count the values of a folder or a GGUF file, None if they are packed, and the bytes.

    None where there are no weights that can be read.
    """
    from safetensors import SafetensorError, safe_open

    if place.suffix == ".gguf":
        size = stored_bytes(place)
        return None if size is None else (None, size)
    paths = sorted(place.glob("*.safetensors"))
    parameters, packed = 0, False
    try:
        for path in paths:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    tensor = file.get_slice(name)
                    packed |= tensor.get_dtype() not in _PLAIN
                    parameters += math.prod(tensor.get_shape())
        num_bytes = sum(path.stat().st_size for path in paths)
    except (OSError, SafetensorError):
        return None
    return (None if packed else parameters, num_bytes) if paths else None
