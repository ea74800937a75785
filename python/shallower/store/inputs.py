"""What a result depends on, by which the store finds it: models, texts, machine.

Loads no torch, so that known results are found in a fraction of a second.
"""

import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache as remembering
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..cutting.checkpoint_files import TEMPLATES_FOLDER
from ..cutting.metadata import without_results
from ..cutting.source import CARD_FILE, hub_id, module_folders
from ..errors import ModelError, ProcessesError, ShallowerError
from ..merging.adapter_config import CONFIG_FILE as ADAPTERS_FILE
from ..merging.adapter_config import remembered_base
from ..models.place import of_hub
from ..models.source import ModelSource
from ..processes import first_processor, processors, requested_threads
from ..progress import track
from ..storage import RECORD, RESULT_RECORD, sha256_of
from ..texts.hub import hub_absence, hub_files
from ..texts.sources import Texts
from ..values.provenance import hash_of, versions
from ..values.tokens import Tokens
from .store import Store

RACY_SECONDS = 0.1
"""A file that changed so recently may change again without another time of change: it is awaited,
so that what is known of a file does not depend on its age."""

_LOOKS = 40
"""How often files are looked at, a quarter of those seconds apart, before they are given up."""

_STAMPS = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_dev", "st_ino")

LARGE_BYTES = 1 << 30
"""From here on hashing is shown by a bar."""

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SEEN = "CUDA_VISIBLE_DEVICES"
_DECIDING = (
    "SHALLOWER_TIER",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "NVIDIA_TF32_OVERRIDE",
)
"""Variables that choose the instructions or devices of a computation."""

_INITIAL = {
    "get_default_dtype": ("torch.float32",),
    "are_deterministic_algorithms_enabled": ("False",),
    "backends.cuda.matmul.allow_tf32": ("False",),
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction": ("True",),
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction": ("True",),
    "backends.cuda.flash_sdp_enabled": ("True",),
    "backends.cuda.mem_efficient_sdp_enabled": ("True",),
    "backends.cuda.math_sdp_enabled": ("True",),
    "backends.mkldnn.enabled": ("True",),
    "backends.mkldnn.matmul.fp32_precision": ("none", "ieee"),
}
"""Settings of torch that change results, and what they are at first."""


def model_inputs(source: ModelSource, store: Store, *, stat: bool = False) -> dict[str, Any] | None:
    """Name what a loaded model depends on: its files, how it is loaded, machine and versions.

    With ``stat``, weights are known by place, size and time of change, and not read. None where it
    is not known, or the store is off.
    """
    files = None if store.folder is None else _files_of(source, store, stat=stat)
    if files is None:
        return None
    place, names = source.place.expanduser(), [str(source.path)]  # which stand in the results
    if place.exists():
        names = [Path(source.path).name, place.resolve().name]
    here = {"machine": machine()} if stat else computed()
    return {"model": {**files, "names": names}, **_loaded_by(source), **here}


def computed() -> dict[str, Any]:
    """What results depend on beside model and items, to their last bits.

    The processors and threads, and settings of torch where that is loaded and they were changed.
    """
    torch, changed = sys.modules.get("torch"), {}
    if torch is not None:
        for name, initial in _INITIAL.items():
            with suppress(AttributeError):  # of an older torch
                value = attrgetter(name)(torch)
                changed[name] = str(value() if callable(value) else value)
            if changed.get(name) in initial:
                del changed[name]
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            changed[f"autocast {device}"] = str(torch.get_autocast_dtype(device))
    return {"machine": machine(), "threads": requested_threads() or processors(), "torch": changed}


def _loaded_by(source: ModelSource) -> dict[str, Any]:
    """The way a model is loaded, and the packages that do it."""
    return {
        "dtype": source.dtype,
        "device_map": repr(source.device_map),
        "trust_remote_code": source.trust_remote_code,
        "made_by": made_by(),
    }


def model_content(source: ModelSource, store: Store) -> str | None:
    """Hash the files of a model, wherever they lie and whatever the store; None if not known.

    The store remembers the hash of a file, where it is on.
    """
    files = _files_of(source, store)
    return None if files is None else hash_of(files)


def _files_of(source: ModelSource, store: Store, *, stat: bool = False) -> dict[str, Any] | None:
    try:
        return _local(source, store, stat) or _on_the_hub(source)
    except (OSError, ValueError, AttributeError, RuntimeError):
        return None  # not there or damaged: loading it says so


def job_of(source: ModelSource, content: str | None, inputs: Any) -> str | None:
    """Name work on a model by all that its result depends on but the machine and places.

    ``content`` is :func:`model_content`, and ``inputs`` all else. None if either is not known.
    """
    if content is None or inputs is None:
        return None
    return hash_of({"model": content, **_loaded_by(source), "of": inputs})


def texts_inputs(texts: Texts | Iterable[str] | None, store: Store) -> dict[str, Any] | None:
    """Identify texts as :func:`texts_content`, for a key of the store.

    None where the store is off, or they are a whole dataset of the hub, too much to read for this.
    """
    if store.folder is None:
        return None
    if isinstance(texts, Texts) and texts.limit is None:
        return texts_content(texts, store) if Path(texts.source).expanduser().is_file() else None
    return texts_content(texts, store)


def texts_content(texts: Texts | Iterable[str] | None, store: Store) -> dict[str, Any] | None:
    """Identify texts by the strings that are read, from any file; None for broken ones."""
    if texts is None:
        return None
    stamps = None
    if isinstance(texts, Texts):
        path = Path(texts.source).expanduser()
        stamps = path.is_file() and _stamps([path])
    memo = {"texts": stamps, "limit": getattr(texts, "limit", None)} if stamps else None
    known = store.get("files", memo)
    if known is None:
        known = _hash_of_texts(texts)
        if known is not None:
            store.put("files", memo, known)
    return known


def items_of(texts: Texts | Iterable[str] | None, tokens: Tokens, store: Store) -> str | None:
    """Identify a test set by its texts and how they become tokens; None for broken texts."""
    content = texts_content(texts, store)
    return None if content is None else hash_of([content, asdict(tokens)])


def inputs_of(
    store: Store,
    models: Mapping[str, ModelSource | None],
    texts: Mapping[str, Texts | Iterable[str] | None],
    **settings: Any,
) -> dict[str, Any] | None:
    """Put together what a command's result depends on; None where a part is not known.

    Models and texts are named by their options, and None where those were not given; settings are
    JSON values.
    """
    if store.folder is None:
        return None
    found: dict[str, Any] = {}
    for name, source in models.items():
        found[name] = None if source is None else model_inputs(source, store)
        if source is not None and found[name] is None:
            return None
    for name, some in texts.items():
        found[name] = texts_inputs(some, store)
        if some is not None and found[name] is None:
            return None
    return {**found, **settings}


def adapters_inputs(adapters: Path, model: str | None, store: Store) -> dict[str, Any] | None:
    """Identify adapters by their files and their cut, ``model`` or the one that they name.

    None if unknown, or the store is off.
    """
    if store.folder is None:
        return None
    try:
        base = model or remembered_base(adapters)
        own = hash_of_files(sorted(p for p in adapters.iterdir() if p.is_file()), store)
    except (OSError, RecursionError, ShallowerError):
        return None  # damaged: loading them says so
    cut = model_inputs(ModelSource(base), store)
    return None if cut is None else {"adapters": own, "cut": cut}


def file_inputs(path: str | Path) -> list[Any] | None:
    """Identify a file, unread, by place, size and time of change; None if absent or changing."""
    try:
        return _stamps([Path(path).expanduser()])
    except (ValueError, RuntimeError):  # no name of a file, or of no home
        return None


def hash_of_files(files: list[Path], store: Store, folder: Path | None = None) -> str:
    """Hash contents of files and their names, in ``folder`` if given; OSError if one is unreadable.

    One that is all of it may have any name. Each is read only once; results of cards do not count.
    """
    names = [file.relative_to(folder).as_posix() if folder else file.name for file in files]
    hashes = [
        hash_of_card(file) if file.name.endswith(CARD_FILE) else sha256
        for file, sha256 in zip(files, hashes_of(files, store), strict=True)
    ]
    return hash_of([*zip([""] if len(files) == 1 else names, hashes, strict=True)])


def hash_of_card(file: Path) -> str:
    """Hash a card without its results, which are also measured later (``eval --card``)."""
    return hash_of(without_results(file.read_bytes().decode("utf-8-sig", errors="replace")))


def hashes_of(files: list[Path], store: Store) -> list[str]:
    """Hash the content of files, each read only once; OSError if one cannot be read."""
    total = sum(file.stat().st_size for file in files)
    with track("hash, MiB", total >> 20, None if total >= LARGE_BYTES else False) as advance:
        found = []
        for file in files:
            found.append(_hash_of_file(file, store))
            advance(file.stat().st_size >> 20)
    return found


def model_files(source: ModelSource) -> tuple[list[Path], str | None]:
    """Find the files of a model: all in a folder, or one GGUF file; and its commit on the hub.

    Of a repository they are those in the hub's cache. OSError where there are none.
    """
    path, commit, found = source.place.expanduser(), None, _hub_file(source)
    if found is not None:
        path, commit = found if source.gguf_file else found.parent, _commit_of(source, found)
    if path.is_file():
        return [path], commit
    return _files_in(path), commit


def stated_hashes(source: ModelSource, commit: str | None) -> dict[str, str]:
    """The SHA-256 of a repository's safetensors as the hub states them, which it may have sent in
    parts alone; none where it cannot be asked.
    """
    from huggingface_hub import constants

    if commit is None or constants.HF_HUB_OFFLINE or hub_absence() is not None:
        return {}
    try:
        files = hub_files(str(source.path), commit)
    except Exception:  # of the hub's client, which has had several
        return {}
    weights = [one for one in files if one.rfilename.endswith(".safetensors")]
    return {one.rfilename: one.lfs.sha256 for one in weights if one.lfs is not None}


def _hash_of_file(file: Path, store: Store) -> str:
    stamps = _stamps([file])
    memo = None if stamps is None else {"file": stamps}
    known = store.get("files", memo)
    if known is not None:
        return str(known["sha256"])
    found = sha256_of(file)
    if stamps == _stamps([file]):
        store.put("files", memo, {"sha256": found})
    return found


@remembering
def machine() -> dict[str, Any]:
    """Describe the processors here, as far as a result's last bits depend on them."""
    fields = first_processor()
    deciding = ("model name", "flags", "Features", "CPU part")
    own = {name: fields[name] for name in deciding if name in fields}
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [line for card in cards for line in _lines(card) if line.startswith("Model:")]
    nodes = [path.name for path in Path("/dev").glob("nvidia[0-9]*")]
    return {
        "architecture": platform.machine(),
        "cpu": hash_of(own),
        "gpus": sorted({*models}) if models else sorted(nodes),
        "variables": {name: os.environ[name] for name in _DECIDING if name in os.environ}
        | _visible(models, nodes),
    }


def _visible(models: Collection[str], nodes: Collection[str]) -> dict[str, str]:
    """The variable that says which cards are seen, as far as it decides what computes.

    Of cards that are alike any may; without cards it says nothing.
    """
    found = os.environ.get(_SEEN)
    is_alike = bool(found) and len({*models}) == 1
    return {} if found is None or is_alike or not (models or nodes) else {_SEEN: found}


@remembering
def made_by() -> dict[str, str]:
    """Name the versions of the packages that make a result, and hash this one's own code."""
    package = Path(__file__).parents[1]
    files = sorted([*package.rglob("*.py"), *package.glob("_core*")])
    code = hash_of([[str(path.relative_to(package)), sha256_of(path)] for path in files])
    return {**versions("accelerate", "tokenizers", "gguf", "kernels"), "code": code}


def check_machine(driver: Mapping[str, Any]) -> None:
    """Refuse to measure what other processors do: ProcessesError."""
    for name, found in machine().items():
        has, wanted = (
            {key: value for key, value in one.items() if key != _SEEN}
            if name == "variables"
            else one
            for one in (found, driver.get(name, {}))
        )
        if has != wanted:
            raise ProcessesError(
                f"the processors here are not those that the study began on, so that last bits "
                f"would differ ({name}: {has or 'none'} and {wanted or 'none'}): use like "
                f"machines, or carry out whole studies on each (shallower compare)"
            )


def check_made_by(driver: Mapping[str, str]) -> None:
    """Refuse to work for a driver that has other packages: ProcessesError."""
    mine = made_by()
    for name in sorted({*mine, *driver}, key=lambda one: (one != "shallower", one)):
        if mine.get(name) != driver.get(name):
            has, wanted = (found.get(name, "none")[:12] for found in (mine, driver))
            raise ProcessesError(
                f"this node has {name} {has}, the driver {wanted}: install the same on both"
            )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _local(source: ModelSource, store: Store, stat: bool) -> dict[str, Any] | None:
    """A folder by the files of the model, or a GGUF file; None if it is neither."""
    path = source.place.expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _files_in(path)
    else:
        return None
    if _reaches_elsewhere(files):
        return None
    found: dict[str, Any] = {}
    weights = [file for file in files if stat and file.suffix in _WEIGHTS]
    if weights:
        found["stamps"] = _stamps(weights)
        if found["stamps"] is None:
            return None
    others = [file for file in files if file not in weights]
    return {**found, "sha256": hash_of_files(others, store, path if path.is_dir() else None)}


def _files_in(folder: Path) -> list[Path]:
    """All files of a model, hidden ones too; how it was made is none of them.

    Those in it come first, then those in folders of chat templates and of an embedder's modules.
    """
    own = {RESULT_RECORD, RECORD}
    files = sorted(one for one in folder.iterdir() if one.is_file() and one.name not in own)
    for name in sorted({TEMPLATES_FOLDER, *module_folders(folder)}):
        files += sorted(one for one in (folder / name).rglob("*") if one.is_file())
    return files


def _reaches_elsewhere(files: list[Path]) -> bool:
    """True if a model is also made of what lies in other folders or repositories."""
    for file in files:
        if file.name == ADAPTERS_FILE:
            return True
        if file.name in ("config.json", "tokenizer_config.json"):
            homes = json.dumps(json.loads(file.read_bytes()).get("auto_map") or {})
            if "--" in homes or "/" in homes:
                return True
        if file.name.endswith(".index.json"):
            names = json.loads(file.read_bytes()).get("weight_map") or {}
            if any("/" in str(name) for name in names.values()):
                return True
    return False


def _on_the_hub(source: ModelSource) -> dict[str, Any] | None:
    """A repository by its commit on the hub, or in the hub's cache where that is off."""
    found = _hub_file(source)
    commit = None if found is None else _commit_of(source, found)
    if found is None or commit is None or _reaches_elsewhere([found]):
        return None
    return {"commit": commit, "gguf_file": source.gguf_file}


def _hub_file(source: ModelSource) -> Path | None:
    """The config or GGUF file of a repository, in the hub's cache; None where it is none."""
    name = str(source.path)
    if hub_id(name) is None or Path(name).expanduser().exists():
        return None
    try:
        return of_hub(name, _wanted(source))
    except ModelError:
        return None  # loading it says why


def _wanted(source: ModelSource) -> str:
    return source.gguf_file or "config.json"


def _commit_of(source: ModelSource, found: Path) -> str | None:
    commit = found.parents[_wanted(source).count("/")].name
    return commit if _COMMIT.fullmatch(commit) else None


def _stamps(files: Iterable[Path]) -> list[Any] | None:
    """Place, size, times and number of files that rest; None if one is not there, or never does."""
    files = list(files)
    for _ in range(_LOOKS):
        try:
            found = [(str(file.absolute()), file.stat()) for file in files]
        except OSError:
            return None
        now = time.time()
        ages = (abs(now - at) for _, one in found for at in (one.st_mtime, one.st_ctime))
        if min(ages, default=RACY_SECONDS) >= RACY_SECONDS:
            return [[place, *(getattr(one, name) for name in _STAMPS)] for place, one in found]
        time.sleep(RACY_SECONDS / 4)
    return None


def _hash_of_texts(texts: Iterable[str]) -> dict[str, Any] | None:
    digest, count = hashlib.sha256(), 0
    try:
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
            count += 1
    except (ShallowerError, AttributeError):  # reading them says what is wrong
        return None
    return {"texts": count, "sha256": digest.hexdigest()}
