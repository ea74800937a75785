"""Commands that were carried out before: what they left is still there, so they say it again.

The store has by output its job's hash, its files' marks (hash, or size and time of large ones) and
what was printed. A changed output counts as unknown. The output itself cannot keep these facts,
because a scan or a GGUF file has no folder of its own.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ..cutting.exports import EXPORT_FILES, export_path
from ..cutting.plans import NamedLayers
from ..cutting.source import find_source
from ..models.source import ModelSource
from ..storage import sha256_of
from ..texts.sources import Texts
from ..values.provenance import hash_of
from .inputs import inputs_of, model_inputs
from .store import Entry, Store

SMALL_BYTES = 16 << 20
"""Files up to this size are known by their content."""


@dataclass
class Output:
    """The output of a command, and what the store knows of it.

    ``inputs`` gives all that it depends on, as JSON values, or None where that cannot be known; it
    is called once, and only if something is kept of this place. ``names`` are the files and folders
    in ``out`` that are the output; all of ``out`` by default.
    """

    store: Store
    command: str
    out: Path
    inputs: Callable[[], Mapping[str, Any] | None]
    names: tuple[str, ...] | None = None

    def find(self) -> Entry | None:
        """Look for what this command printed, as what it left is here; None to carry it out."""
        entry = self.store.find("files", self._place)
        if entry is None or not self._is_intact(entry.value) or self._job is None:
            return None
        if entry.value.get("job") != self._job:
            return None
        return Entry(entry.value["value"], entry.made)

    def keep(self, value: dict[str, Any]) -> dict[str, Any]:
        """Remember what was just left here, and ``value``, which cannot be read from the files."""
        if self.store.folder is not None and self._job is not None:
            try:
                marks = {name: _mark(path) for name, path in self._files()}
            except OSError:  # somebody has taken it away already
                return value
            found = {"job": self._job, "marks": marks, "value": value}
            self.store.put("files", self._place, found)
        return value

    @cached_property
    def _job(self) -> str | None:
        inputs = self.inputs()
        return None if inputs is None else hash_of(inputs)

    @property
    def _place(self) -> dict[str, Any]:
        names = None if self.names is None else list(self.names)
        return {"command": self.command, "out": str(self.out.absolute()), "names": names}

    def _files(self) -> list[tuple[str, Path]]:
        """All files that are the output, by their names in ``out``; ``.`` is ``out`` itself."""
        tops = [self.out] if self.names is None else [self.out / name for name in self.names]
        paths = [
            path
            for top in tops
            for path in (sorted(top.rglob("*")) if top.is_dir() else [top])
            if path.is_file() and not path.is_symlink()
        ]
        return [(str(PurePosixPath(path.relative_to(self.out))), path) for path in paths]

    def _is_intact(self, found: Mapping[str, Any]) -> bool:
        """Whether the files are as they were left; what else lies beside them does not matter."""
        marks = found.get("marks")
        if not isinstance(marks, dict) or not isinstance(found.get("value"), dict):
            return False
        try:
            there = dict(self._files())
            return bool(marks) and all(
                name in there and _mark(there[name]) == mark for name, mark in marks.items()
            )
        except OSError:
            return False


def output_of(
    store: Store,
    command: str,
    out: Path,
    *,
    models: Mapping[str, ModelSource | None],
    texts: Mapping[str, Texts | Iterable[str] | None],
    **settings: Any,
) -> Output:
    """Describe the output of a command that depends on models, texts and settings.

    Models and texts are named by their options, and hashed when that is needed; settings are
    JSON values, or give themselves as JSON.
    """
    return Output(store, command, out, lambda: inputs_of(store, models, texts, **settings))


def cut_output(
    store: Store,
    model: str,
    layers: NamedLayers,
    *,
    out: Path,
    device_map: str | None,
    gguf_file: str | None,
    trust_remote_code: bool,
    as_gguf: bool,
    **options: Any,
) -> Output:
    """Describe the output of :func:`shallower.prune`, whose weights would take long to hash."""
    names = None
    if out.suffix == ".gguf":
        names = (out.name, *(export_path(out, name).name for name in EXPORT_FILES))

    def inputs() -> dict[str, Any] | None:
        source = ModelSource(model, "auto", device_map, gguf_file, trust_remote_code)
        known = model_inputs(source, store, stat=True)
        if known is None:
            return None
        card = find_source(model, gguf_file=gguf_file)  # also of files beside a GGUF file
        licenses = {name: sha256_of(path) for name, path in card.licenses.items()}
        told = {"card": [card.inherited, card.text, licenses]}
        return {**known, **told, "layers": layers, "as_gguf": as_gguf, **options}

    place = out if names is None else out.parent
    return Output(store, "prune", place, inputs, names=names)


def _mark(path: Path) -> list[Any]:
    status = path.lstat()
    if status.st_size <= SMALL_BYTES:
        return [status.st_size, sha256_of(path)]
    return [status.st_size, status.st_mtime_ns, status.st_ino]
