"""Cutting layers out of a checkpoint on disk, without loading its weights.

The config is shortened as for a cut in memory: for the families of :mod:`.models.plain` from
its JSON alone, in little memory; for others a model is built on the meta device and the cut is
checked on it, which loads torch. The tensors of the layers that stay get their new numbers and
are copied from file to file by the core, whatever they hold: quantised weights stay as they
are, bit by bit.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._core import Checkpoint, Job
from ..errors import ModelError, OutputError, PlanError
from ..progress import track
from ..storage import check_free, partial_folder, resumable_folder
from ..values.files import PLAN_FILE
from ..values.layers import MAX_LAYERS, Layers, blocks_of, dropped_layers
from ..values.plan import ModelIdentity, Plan, fingerprint
from .cards import CARD_FILE, exports, range_list
from .plain import plain_model
from .tensor_names import (
    QUANTISATION_KEYS,
    Description,
    Renumbering,
    check_alike,
    find_prefix,
    module_of,
)

Progress = Callable[[int, int], object]
"""Hears of the bytes copied so far and of those in all; what it raises stops the copy."""

CONFIG_FILE = "config.json"

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_OTHER_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5",
    ".msgpack", ".onnx", ".onnx_data", ".npz", ".tflite", ".pkl", ".pickle",
)  # fmt: skip
_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_NOT_CARRIED = (CONFIG_FILE, PLAN_FILE, "params.json")
"""Rewritten here, or the layer count of another format."""
_SUBFOLDERS = ("additional_chat_templates",)
_MAX_CARRIED_BYTES = 256 << 20
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def prune_checkpoint(
    source: str | Path,
    layers: Layers,
    out: str | Path,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    plan: Plan | None = None,
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Drop layers from a checkpoint of safetensors, without loading it, whole or not at all.

    Dtypes and quantised weights stay as they are stored. An interrupted copy stays in the
    hidden sibling ``.NAME.partial`` of ``out``, and goes on when the same call is made again.

    Args:
        source: a local folder with ``config.json`` and safetensors.
        layers: blocks, ranges or indices, 0-based.
        out: a folder that does not exist yet, or is empty.
        max_shard_size: bytes of tensors in a file at most, as a number or as ``5GB``.
        overwrite: replace what is at ``out``, once the new checkpoint is complete.
        plan: the plan behind ``layers``; it is checked against the checkpoint and saved.
        progress: a function of the bytes copied and the bytes in all, or whether to show a
            bar; by default if standard error is a terminal.
        trust_remote_code: run code that comes with the model.

    Returns:
        The plan that was carried out, as it is saved in ``shallower_plan.json``.

    Raises:
        LayersError: a layer that is not there, is named twice, or is the last one left.
        PlanError: ``plan`` is of other layers, or of another model.
        ModelError: no such checkpoint, one that is damaged or incomplete, or a cut that its
            config cannot describe.
        OutputError: ``out`` holds something already or cannot be written to, or
            ``max_shard_size`` is no size.
    """
    check_free(Path(out), overwrite)
    cut = prepare(source, layers, max_shard_size, plan, trust_remote_code)
    cut.write(out, overwrite, progress)
    return cut.plan


@dataclass(frozen=True, slots=True)
class PreparedCut:
    """A cut of a checkpoint on disk, checked and laid out, and not yet made.

    Attributes:
        plan: what goes, with the identity of the checkpoint.
        job: the copy of the tensors that stay.
        texts: the files beside them that are written anew, by name.
        carried: the files beside them that are copied, by name.
    """

    plan: Plan
    job: Job
    texts: Mapping[str, str]
    carried: Mapping[str, Path]

    @property
    def files(self) -> list[str]:
        """The names of all files of the cut."""
        return sorted(
            [*(name for name, _ in self.job.files), *self.texts, *self.carried, PLAN_FILE]
        )

    @property
    def num_bytes(self) -> int:
        """The bytes of the files of weights."""
        return sum(size for _, size in self.job.files)

    def write(
        self, out: str | Path, overwrite: bool = False, progress: Progress | bool | None = None
    ) -> None:
        """Make the cut, or go on with it.

        Raises:
            OutputError, ModelError: as :func:`prune_checkpoint`.
        """
        out = Path(out)
        with resumable_folder(out, self.job.journal, overwrite) as folder:
            try:
                self._write(folder, progress)
            except (OSError, OutputError) as error:
                raise OutputError(
                    f"cannot write {out}: {error}; what is complete stays in "
                    f"{partial_folder(out)}: do the same again to go on, or delete it"
                ) from error

    def _write(self, folder: Path, progress: Progress | bool | None) -> None:
        ours = {name for name, _ in self.job.files}
        for left in folder.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name not in ours:
                left.unlink()
        self._check_room(folder)
        for name, path in self.carried.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        self.plan.save(folder / PLAN_FILE)
        with _reporting(progress, self.job.total_bytes) as report:
            self.job.write(folder, report)

    def _check_room(self, folder: Path) -> None:
        there = sum(file.stat().st_size for file in folder.iterdir())
        carried = sum(path.stat().st_size for path in self.carried.values())
        needed = self.num_bytes + carried - there
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OutputError(f"{needed} bytes are needed, {free} are free")


def prepare(
    source: str | Path,
    layers: Layers,
    max_shard_size: int | str = "5GB",
    plan: Plan | None = None,
    trust_remote_code: bool = False,
) -> PreparedCut:
    """Check a cut of a checkpoint and lay it out; nothing is written.

    Raises:
        LayersError, PlanError, ModelError, OutputError: as :func:`prune_checkpoint`.
    """
    size = parse_size(max_shard_size)
    folder = Path(source).expanduser()
    stored = Checkpoint(folder)
    raw = _read_config(stored.resolve(CONFIG_FILE))
    model = _describe(folder, raw, trust_remote_code)
    total = model.shape[1]
    dropped = dropped_layers(total, layers)
    survivors = tuple(index for index in range(total) if index not in set(dropped))
    weights = {tensor[0]: Stored(*tensor[1:]) for tensor in stored.tensors()}
    more = _num_more(raw)
    prefix = find_prefix(weights, model.path, total, more)
    if more and not any(name.startswith(f"{prefix}{total}.") for name in weights):
        more = 0
    stored_survivors = (*survivors, *range(total, total + more))
    _check_layers(model.kinds, prefix, weights)
    paths = (model.path, prefix.removesuffix("."))
    renumbering = Renumbering(paths, stored_survivors)
    modules = {module_of(name) for name in weights if name.startswith(prefix)}
    named = {model.path + module.removeprefix(paths[1]) for module in modules} | modules
    files = dict(_carried(stored))
    texts = {CONFIG_FILE: _edited(model, raw, survivors, renumbering, named)}
    for name in _QUANTISATION_FILES:
        if name in files:
            texts[name] = _renumbered(_read_json(files.pop(name)), renumbering, named)
    identity = _identify(model, _stored_dtype(raw), weights, prefix)
    plan = _checked(plan, total, dropped, identity)
    options = {"max_shard_size": max_shard_size, "trust_remote_code": trust_remote_code}
    texts |= _exports(source, plan, options, _stored_dtype(raw), files.get(CARD_FILE))
    return PreparedCut(
        plan,
        stored.cut([prefix], total + more, list(stored_survivors), size),
        texts,
        {name: path for name, path in files.items() if name not in texts},
    )


def _num_more(raw: Mapping[str, Any]) -> int:
    """Layers for multi-token prediction, stored behind the others; they stay, with new numbers."""
    inner = raw.get("text_config")
    for config in (raw, inner if isinstance(inner, dict) else {}):
        for name in ("num_nextn_predict_layers", "num_mtp_layers"):
            if type(count := config.get(name)) is int and 0 < count <= MAX_LAYERS:
                return count
    return 0


def count_stored_layers(source: str | Path, trust_remote_code: bool = False) -> int:
    """The number of decoder layers of a checkpoint by its config alone.

    Raises:
        ModelError: as :func:`prune_checkpoint`.
    """
    folder = Path(source).expanduser()
    plain = plain_model(folder, _read_config(folder / CONFIG_FILE))
    if plain is not None:
        return plain.shape[1]
    from ..models.loading import count_layers

    return count_layers(folder, trust_remote_code=trust_remote_code)


def _describe(folder: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> Description:
    plain = plain_model(folder, raw)
    if plain is not None:
        return plain
    from .built import BuiltModel

    return BuiltModel(folder, trust_remote_code)


def _exports(
    source: str | Path, plan: Plan, options: dict[str, Any], dtype: str, card: Path | None
) -> dict[str, str]:
    """The files for people and other tools; ``options`` are of :func:`prune_checkpoint`."""
    given = {name: value for name, value in options.items() if value not in ("5GB", False)}
    words = [f", {name}={value!r}" for name, value in given.items()]
    python = f"sh.prune_checkpoint({str(source)!r}, {range_list(plan)}, 'cut'{''.join(words)})"
    command = []
    for name, value in given.items():
        command += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return exports(plan, str(source), python, command, dtype, card)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a local folder holds a config and safetensors."""
    folder = Path(path).expanduser()
    weights = any((folder / name).is_file() for name in _WEIGHTS)
    return weights and (folder / CONFIG_FILE).is_file()


def stored_dtype(path: str | Path) -> str:
    """What the config in a folder says that its weights are stored in; ``unknown`` if nothing.

    ``nf4``, ``int8``, the name of another quantisation, or torch's name of a dtype.

    Raises:
        ModelError: there is no config, or it is not JSON.
    """
    path = Path(path).expanduser() / CONFIG_FILE
    return _stored_dtype(_read_json(path))


def _stored_dtype(raw: Mapping[str, Any]) -> str:
    quantised = raw.get("quantization_config")
    if isinstance(quantised, dict):
        for key, name in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
            if quantised.get(key):
                return name
        return str(quantised.get("quant_method", "quantised"))
    return str(raw.get("dtype") or raw.get("torch_dtype") or "unknown").removeprefix("torch.")


def parse_size(size: int | str) -> int:
    """Bytes from a number or from words such as ``5GB`` or ``500MiB``.

    Raises:
        OutputError: it is no size, or less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(size).strip().upper())
    unit = {**_UNITS, **_BINARY_UNITS}.get(match[2]) if match else None
    if match and unit and 1 <= float(match[1]) * unit < 2**63 and not isinstance(size, bool):
        return int(match[1]) * unit if match[1].isdecimal() else int(float(match[1]) * unit)
    raise OutputError(f"{size!r} is no size of a shard: expected bytes, or words such as 5GB")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: expected a JSON object")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    raw = _read_json(path)
    if raw.get("transformers_weights"):
        raise ModelError(
            f"{CONFIG_FILE} places the weights in {raw['transformers_weights']!r}: expected "
            f"{' or '.join(_WEIGHTS)}, name them so and remove transformers_weights"
        )
    count = raw.get("num_hidden_layers")
    if isinstance(count, int) and count > MAX_LAYERS:
        raise ModelError(f"{path} counts {count} layers: expected at most {MAX_LAYERS}")
    return raw


class Stored(NamedTuple):
    """A tensor of a checkpoint, and where its bytes begin."""

    dtype: str
    shape: list[int]
    path: Path
    start: int


def _check_layers(kinds: Sequence[object], prefix: str, weights: Mapping[str, Stored]) -> None:
    tensors: list[dict[str, str]] = [{} for _ in kinds]
    for name, stored in weights.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal() and int(number) < len(tensors):
            tensors[int(number)][rest] = stored.dtype
    check_alike(tensors, kinds)


def _edited(
    model: Description,
    raw: Mapping[str, Any],
    survivors: Sequence[int],
    renumbering: Renumbering,
    modules: set[str],
) -> str:
    """The text of the new config: the old one, with what the cut changes."""
    edited = model.shortened(raw, survivors)
    for key in QUANTISATION_KEYS:
        if key in raw:
            edited[key] = json.loads(_renumbered(raw[key], renumbering, modules))
    return json.dumps(edited, indent=2, ensure_ascii=False) + "\n"


def _renumbered(value: Any, renumbering: Renumbering, modules: set[str]) -> str:
    renumbering.check_patterns(value, modules)
    return json.dumps(renumbering.edit(value), indent=2, ensure_ascii=False) + "\n"


def _carried(stored: Checkpoint) -> Iterator[tuple[str, Path]]:
    """The files beside the weights that belong to the model: tokenizer, templates, code."""
    for entry in sorted(stored.folder.iterdir()):
        names = [entry.name]
        if entry.is_dir():
            inner = entry.iterdir() if entry.name in _SUBFOLDERS else ()
            names = sorted(f"{entry.name}/{file.name}" for file in inner)
        for name in names:
            hidden = entry.name.startswith(".") or entry.name in _NOT_CARRIED
            if hidden or name.endswith(_OTHER_WEIGHTS):
                continue
            try:
                path = stored.resolve(name)
            except ModelError as error:
                warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                continue
            if path.stat().st_size > _MAX_CARRIED_BYTES:
                warnings.warn(f"{name} is left out: it is too large", stacklevel=2)
                continue
            yield name, path


def _identify(
    model: Description, dtype: str, weights: Mapping[str, Stored], prefix: str
) -> ModelIdentity | None:
    """The identity of the model once it is loaded; None if that cannot be told.

    Its names may be those of a model without its head, or others altogether.
    """
    missing_head = (model.path + ".").removesuffix(prefix)

    def read(name: str) -> bytes:
        if name.startswith(model.path + "."):
            name = prefix + name.removeprefix(model.path + ".")
        elif name not in weights:
            name = name.removeprefix(missing_head)
        return _bfloat16_bits(weights[name])

    try:
        hashed = fingerprint(model.shape, ((name, read(name)) for name in model.vectors()))
    except KeyError:
        return None
    model_type, total, _, _ = model.shape
    return ModelIdentity(model.name, model_type, total, dtype, hashed)


def _bfloat16_bits(stored: Stored) -> bytes:
    """The values of a small tensor rounded to bfloat16, ties to even; NaN to anything."""
    kind, count = _NUMPY_DTYPES[stored.dtype], math.prod(stored.shape)
    values = np.fromfile(stored.path, kind, count, offset=stored.start)
    if stored.dtype == "BF16":
        return values.tobytes()
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _checked(
    plan: Plan | None, num_layers: int, dropped: tuple[int, ...], identity: ModelIdentity | None
) -> Plan:
    if plan is None:
        return Plan(num_layers, blocks_of(dropped), model=identity)
    if plan.dropped != dropped:
        raise PlanError(f"the plan drops the layers {plan.dropped}, asked for are {dropped}")
    if identity is not None:
        plan.check_model(identity)
    elif plan.model is not None:
        raise PlanError(
            f"the plan was made for {plan.model.name}, and whether this is the same model cannot "
            f"be told from the names of its tensors: name the layers yourself"
        )
    return plan if plan.model else replace(plan, model=identity)


@contextmanager
def _reporting(progress: Progress | bool | None, total: int) -> Iterator[Progress | None]:
    if callable(progress):
        yield progress
        return
    with track("copy, MiB", total >> 20, progress) as advance:
        shown = 0

        def report(done: int, _total: int) -> None:
            nonlocal shown
            advance((done >> 20) - shown)
            shown = done >> 20

        yield report
