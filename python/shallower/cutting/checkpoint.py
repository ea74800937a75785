"""Cutting layers and experts out of a checkpoint on disk, without loading its weights.

The config is shortened as for a cut in memory. For the families of :mod:`.plain` its JSON suffices;
for others a model is built on the meta device and the cut is checked on it, which loads torch. The
core copies the tensors of the layers and experts that stay from file to file, under their new
numbers. It never looks at values, so quantised weights stay as they are, bit by bit. Of stacks of
experts it copies the ranges of bytes that stay. Where a file holds its header alone, the bytes to
be copied can be fetched just before.
"""

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._core import Checkpoint, Job
from ..errors import ModelError, OutputError, why
from ..models.place import CONFIG_FILE, read_json
from ..processes import partial_folder
from ..progress import BytesProgress, say_goes_on, track_copy
from ..storage import check_room, resumable_folder
from ..values.estimates import parse_size
from ..values.files import PLAN_FILE
from ..values.identity import ModelIdentity, fingerprint
from ..values.layers import MAX_LAYERS
from ..values.plan import Plan
from .cards import exports
from .checkpoint_files import (
    QUANTISATION_FILES,
    Piece,
    StoredTensor,
    carried_files,
    config_dtype,
    needs_transformers_5,
    read_config,
    stored_tensors,
)
from .exports import CutFacts
from .mixture import find_stacks, refuse_experts_outside
from .plain import PlainModel, plain_model
from .plans import NamedExperts, NamedLayers, agreed_plan, made_for
from .source import find_source
from .tensor_names import (
    QUANTISATION_KEYS,
    SINGLE_EXPERT,
    Renumbering,
    check_alike,
    find_prefix,
    module_of,
    name_under,
)

if TYPE_CHECKING:
    from .built import BuiltModel

    Description = PlainModel | BuiltModel  # what the names of tensors do not say

SHARD_SIZE = "5GB"
"""Bytes in a file of weights at most, by default."""


Weights = Mapping[str, StoredTensor]
"""The tensors of a checkpoint, or of a layer of it, by their names in it."""

Fetch = Callable[[Iterable[Piece]], object]
"""Brings bytes into files of weights that lack them."""


@dataclass(frozen=True, slots=True)
class PreparedCut:
    """A cut of a checkpoint on disk, checked and laid out, and not yet made."""

    facts: CutFacts  # of the plan with the identity of the checkpoint
    job: Job  # the copy of the tensors that stay
    edited: Mapping[str, str]  # the config and its like, by name
    carried: Mapping[str, Path]  # copied beside them, by name
    num_more: int = 0  # layers for multi-token prediction, behind the others
    reads: Sequence[Piece] = ()  # of the source, if bytes of it must be fetched

    @property
    def plan(self) -> Plan:
        """What is cut."""
        return self.facts.plan

    @property
    def texts(self) -> dict[str, str]:
        """The files that are written anew, by name."""
        return {**self.edited, **exports(self.facts)}

    @property
    def files(self) -> list[str]:
        """All file names of the cut."""
        return sorted(
            [*(name for name, _ in self.job.files), *self.texts, *self.carried, PLAN_FILE]
        )

    @property
    def num_bytes(self) -> int:
        """Size of the files of weights."""
        return sum(size for _, size in self.job.files)

    def write(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        progress: BytesProgress | bool | None = None,
        check: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Make the cut in ``out``, or continue an interrupted one.

        ``check`` gets the complete folder before it takes its place; what it refuses is removed.
        """
        out = Path(out)
        check_room(out, self.num_bytes)
        with resumable_folder(out, self.job.journal, overwrite) as folder:
            try:
                self.fill(folder, progress)
            except (OSError, OutputError) as error:
                where = partial_folder(out)
                stays = f"; what is complete stays in {where}: do the same again to go on"
                rest = f"{stays}, or delete it" if any(folder.iterdir()) else ""
                raise OutputError(f"cannot write {out}: {why(error, out)}{rest}") from error
            try:
                check(folder)
            except ModelError:
                shutil.rmtree(folder)
                raise

    def fill(self, folder: Path, progress: BytesProgress | bool | None) -> None:
        """Write all files into a folder, and go on with what an interrupted call left there."""
        ours = {name for name, _ in self.job.files}
        for left in folder.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name not in ours:
                left.unlink()
        there = sum(1 for _ in folder.iterdir())
        if there and not callable(progress):
            say_goes_on(f"{there} of {len(ours)} files of weights are there", progress)
        for name, path in self.carried.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        self.plan.save(folder / PLAN_FILE)
        with track_copy(progress, self.job.total_bytes) as report:
            self.job.write(folder, report)


def prepare(
    source: str | Path,
    layers: NamedLayers,
    *,
    experts: NamedExperts | None = None,
    label: str = "",
    max_shard_size: int | str | None = None,
    trust_remote_code: bool = False,
    fetch: Fetch | None = None,
) -> PreparedCut:
    """Check a cut of a local folder with ``config.json`` and safetensors, and write nothing.

    ``label`` names the source in errors. ``fetch`` brings the small tensors of the model's identity
    into files that hold their headers alone. Raises InMemoryOnlyError for a model that cannot be
    cut on disk.
    """
    size = parse_size(SHARD_SIZE if max_shard_size is None else max_shard_size, OutputError)
    folder = Path(source).expanduser().resolve()
    stored, raw, weights = _opened(folder)
    mixed = experts is not None or (isinstance(layers, Plan) and layers.experts is not None)
    model = _describe(folder, raw, trust_remote_code, experts_of=weights if mixed else None)
    total = model.shape.num_layers
    wanted = agreed_plan(
        label or str(source),
        total,
        layers,
        experts=experts,
        count_experts=lambda: model.mixture().num_experts,
    )
    survivors = wanted.survivors
    more = num_more(raw)
    prefix = find_prefix(weights, model.path, total, num_more=more)
    if more and not any(name.startswith(f"{prefix}{total}.") for name in weights):
        more = 0
    stored_survivors = (*survivors, *range(total, total + more))
    _check_layers(model.kinds, prefix, weights)
    paths = (model.path, prefix.removesuffix("."))
    renumbering = Renumbering(paths, stored_survivors, wanted.experts)
    modules = {module_of(name) for name in weights if name.startswith(prefix)}
    named = {model.path + module.removeprefix(paths[1]) for module in modules} | modules
    files = dict(carried_files(stored))
    mixture = _mixture(model, wanted, prefix, weights)
    texts = {CONFIG_FILE: _edited(model, raw, wanted, renumbering, named)}
    for name in QUANTISATION_FILES:
        if name in files:
            texts[name] = _renumbered(read_json(files.pop(name)), renumbering, named)
    found = _identify(model, config_dtype(raw), weights, prefix=prefix, fetch=fetch)
    wanted = made_for(wanted, found)
    facts = CutFacts(
        wanted,
        find_source(folder),
        options={
            "max_shard_size": None if max_shard_size == SHARD_SIZE else max_shard_size,
            "trust_remote_code": trust_remote_code,
        },
        dtype=config_dtype(raw),
        needs_5=needs_transformers_5(raw),
        loader=model.loader,
    )
    return PreparedCut(
        facts,
        stored.cut([prefix], total + more, list(stored_survivors), size, mixture),
        texts,
        {name: path for name, path in files.items() if name not in texts},
        more,
        [] if fetch is None else list(_reads(weights, prefix, stored_survivors, mixture)),
    )


def identity_of(source: str | Path, trust_remote_code: bool = False) -> ModelIdentity | None:
    """The identity that a local folder of safetensors has when loaded; None where names hide it."""
    folder = Path(source).expanduser().resolve()
    _, raw, weights = _opened(folder)
    model = _describe(folder, raw, trust_remote_code, experts_of=None)
    prefix = find_prefix(weights, model.path, model.shape.num_layers, num_more=num_more(raw))
    return _identify(model, config_dtype(raw), weights, prefix=prefix)


def _opened(folder: Path) -> tuple[Checkpoint, dict[str, Any], dict[str, StoredTensor]]:
    """A checkpoint, its config and its tensors by their names."""
    stored = Checkpoint(folder)
    return stored, read_config(stored.resolve(CONFIG_FILE)), stored_tensors(stored)


def num_more(raw: Mapping[str, Any]) -> int:
    """Layers for multi-token prediction, stored behind the others; they stay, with new numbers."""
    inner = raw.get("text_config")
    for config in (raw, inner if isinstance(inner, dict) else {}):
        for name in ("num_nextn_predict_layers", "num_mtp_layers"):
            if type(count := config.get(name)) is int and 0 < count <= MAX_LAYERS:
                return count
    return 0


def _describe(
    folder: Path, raw: Mapping[str, Any], trust_remote_code: bool, *, experts_of: Weights | None
) -> "Description":
    plain = plain_model(folder, raw, experts_of)
    if plain is not None:
        return plain
    from .built import BuiltModel

    return BuiltModel(folder, trust_remote_code)


_Mixture = tuple[int, dict[int, list[int]], set[str]]


def _mixture(model: "Description", plan: Plan, prefix: str, weights: Weights) -> _Mixture | None:
    """The experts that stay, and the stacks that are divided, as the core takes them."""
    dropped = plan.experts
    if dropped is None:
        return None
    model.mixture().check(dropped, gone=plan.dropped)
    refuse_experts_outside(weights, prefix, plan.num_layers)
    layers = _by_layer(prefix, weights, plan.num_layers)
    stacks = find_stacks(dropped, model.stored_experts(plan), layers)
    kept = {layer: list(dropped.kept(layer)) for layer in dropped.by_layer}
    return dropped.num_experts, kept, {f"{prefix}{layer}.{name}" for layer, name in stacks}


def _by_layer(prefix: str, weights: Weights, total: int) -> Sequence[Weights]:
    """The tensors of every layer."""
    layers: list[dict[str, StoredTensor]] = [{} for _ in range(total)]
    for name, stored in weights.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal() and int(number) < total:
            layers[int(number)][rest] = stored
    return layers


def _reads(
    weights: Weights,
    prefix: str,
    survivors: Collection[int],
    mixture: _Mixture | None,
) -> Iterator[Piece]:
    """The bytes that the core copies for such a cut."""
    number, kept, stacks = mixture or (1, {}, set())
    for name, stored in weights.items():
        path, start, stop = stored.piece
        digits, _, rest = name.removeprefix(prefix).partition(".")
        is_layers = name.startswith(prefix) and digits.isdecimal()
        if is_layers and int(digits) not in survivors:
            continue
        experts = kept.get(int(digits)) if is_layers else None
        if experts is None:
            yield stored.piece
        elif name in stacks:
            size = (stop - start) // number
            yield from (Piece(path, start + i * size, start + (i + 1) * size) for i in experts)
        elif (single := SINGLE_EXPERT.search(rest)) is None or int(single[1]) in experts:
            yield stored.piece


def _check_layers(kinds: Sequence[object], prefix: str, weights: Weights) -> None:
    layers = _by_layer(prefix, weights, len(kinds))
    dtypes = [{name: stored.dtype for name, stored in layer.items()} for layer in layers]
    check_alike(dtypes, kinds)


def _edited(
    model: "Description",
    raw: Mapping[str, Any],
    plan: Plan,
    renumbering: Renumbering,
    modules: set[str],
) -> str:
    """The text of the new config: the old one, with what the cut changes."""
    edited = model.shortened(raw, plan)
    for key in QUANTISATION_KEYS:
        if key in raw:
            edited[key] = json.loads(_renumbered(raw[key], renumbering, modules))
    if Path(str(edited.get("_name_or_path"))).is_absolute():
        del edited["_name_or_path"]  # transformers 4 wrote where the model was loaded from
    return json.dumps(edited, indent=2) + "\n"


def _renumbered(value: Any, renumbering: Renumbering, modules: set[str]) -> str:
    renumbering.check_patterns(value, modules)
    return json.dumps(renumbering.edit(value), indent=2) + "\n"


def _identify(
    model: "Description",
    dtype: str,
    weights: Weights,
    *,
    prefix: str,
    fetch: Fetch | None = None,
) -> ModelIdentity | None:
    """The identity that the loaded model has; None for other names, as of one without its head."""

    def find(name: str, saved: str) -> StoredTensor:
        names = (name, saved, name_under(name, f"{model.path}.", prefix))
        return weights[next((one for one in names if one in weights), name)]

    try:
        vectors = [(name, find(name, saved)) for name, saved in model.vectors()]
        if fetch is not None:
            fetch(stored.piece for _, stored in vectors)
        hashed = fingerprint(model.shape, ((name, _bfloat16_bits(one)) for name, one in vectors))
    except KeyError:
        return None
    return ModelIdentity(model.name, model.shape.model_type, model.shape.num_layers, dtype, hashed)


def _bfloat16_bits(stored: StoredTensor) -> bytes:
    """The values of a small tensor rounded to bfloat16, ties to even; NaN to anything."""
    count = math.prod(stored.shape)
    if stored.dtype == "BF16":
        with stored.piece.path.open("rb") as file:
            file.seek(stored.piece.start)
            return file.read(2 * count)
    import numpy as np

    path, start, _ = stored.piece
    values = np.fromfile(path, _NUMPY_DTYPES[stored.dtype], count, offset=start)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
