"""The place of a model, and what is wrong with its files as far as no torch is needed to see it."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .._core import Gguf
from ..errors import MissingExtraError, ModelError, why
from ..progress import track
from ..texts.hub import hub_answers, hub_refusal
from ..texts.quiet import hushed
from ..values.provenance import command_line
from .layer_config import num_decoder_layers

CONFIG_FILE = "config.json"

_BY_CODE = {"auto_map", "quantization_config", "is_encoder_decoder", "n_recurrent_layers"}
"""Keys of configs whose layers are counted, or checked, once transformers has read them."""


def locate(path_or_id: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """The folder or hub id that transformers loads, and the GGUF file in it."""
    path = Path(path_or_id).expanduser()
    if re.match(r"\w+://", str(path_or_id)):
        way_out = "a folder, a hub id as OWNER/NAME, or a .gguf file"
        raise ModelError(f"{path_or_id} is an address: expected {way_out}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is a file: expected a folder, a hub id or a .gguf file")
        path, gguf_file = path.parent, path.name
    looks_local = isinstance(path_or_id, Path) or str(path_or_id).startswith(("/", ".", "~"))
    if not path.is_dir() and (looks_local or path.suffix == ".gguf"):
        raise ModelError(f"there is no model at {path}")
    if path.is_dir() and gguf_file and not (path / gguf_file).is_file():
        raise ModelError(f"there is no file {gguf_file} in {path}")
    if path.is_dir() and not gguf_file and not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json: {_instead_in(path)}")
    if gguf_file and find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf", "reading a GGUF file")
    return str(path) if path.is_dir() else str(path_or_id), gguf_file


def _instead_in(folder: Path) -> str:
    """What was expected in a folder, and the way out by what lies there instead."""
    if (folder / "adapter_config.json").is_file():
        command = command_line("merge", str(folder), "--out", "MERGED")
        return f"it holds adapters, which {command} makes a model of"
    files = sorted(folder.glob("*.gguf"))
    if files:
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        return f"name the GGUF file in it, {files[0]}{more}"
    return "expected a checkpoint of transformers"


def absence(source: str) -> tuple[str, bool]:
    """What to say of a model that is no folder here, and whether the hub is asked for it."""
    from huggingface_hub import constants

    if Path(source).exists():
        return "", False
    if constants.HF_HUB_OFFLINE:
        why_not = "HF_HUB_OFFLINE is set"
    elif hub_answers(constants.ENDPOINT):
        return ", which is no folder here", True
    else:
        why_not = f"{constants.ENDPOINT} cannot be reached"
    return f", which is no folder here ({why_not}: only the hub's cache was looked in)", False


def check_place(path_or_id: str | Path, gguf_file: str | None = None) -> int | None:
    """Refuse a model that cannot be read; give the number of its layers, None if not known."""
    place, gguf_file = locate(path_or_id, gguf_file)
    name = gguf_file or CONFIG_FILE
    path = Path(place, name) if Path(place).is_dir() else of_hub(place, name)
    if gguf_file is None:
        return None if path is None else _counted(read_json(path))
    try:
        return None if path is None else Gguf(path).num_layers
    except ModelError as error:
        raise ModelError(
            f"{error}; expected a whole GGUF file of a language model: download it again, or name "
            f"another"
        ) from error


def check_weights(folder: Path) -> None:
    """Refuse a folder without weights, and safetensors that end too early: ModelError."""
    from safetensors import SafetensorError, safe_open

    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ModelError(f"{folder} holds no weights: expected safetensors beside its config")
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(str(file), framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is cut off, or no safetensors: download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ModelError if the file is not there, or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {why(error, path)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: expected a JSON object")
    return value


def _counted(raw: dict[str, Any]) -> int | None:
    """Count the layers by the JSON of a config, where it says all by itself."""
    if _BY_CODE & raw.keys():
        return None
    text = raw.get("text_config", raw)
    return num_decoder_layers(SimpleNamespace(**text)) if isinstance(text, dict) else None


def of_hub(name: str, wanted: str) -> Path | None:
    """A file of a repository; None where that has none of its name. ModelError: there is none."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    absent, asks = absence(name)
    try:
        with track(f"ask the hub for {name}", show=None if asks else False), hushed():
            return Path(hf_hub_download(name, wanted, local_files_only=not asks))
    except Exception as error:  # of the hub's client, which has had several
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        way_out = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "connect to the hub"
        reason = f"{wanted} is not there; {way_out}, or name a folder"
        if asks:
            reason = hub_refusal(name, "model") or why(error, name)
        raise ModelError(f"cannot load {name}{absent}: {reason}") from error
