"""Outputs that the cache remembers: what a command wrote before is found, or copied, not made anew.

The cache holds the place of an output and the mark of each of its files: the hash of a small one,
the size and time of change of a large one. An output that somebody has changed since is nothing
that is known.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import OutputError
from ..models.source import ModelSource
from ..storage import check_free, new_file, new_folder, raise_output_error, sha256_of, write_file
from ..texts.sources import Texts
from ..values.files import RESULTS_FILE
from .cache import Cache, Entry
from .cache_keys import inputs_of

SMALL_BYTES = 16 << 20
"""Files up to this size are known by their content."""

KEPT_BYTES = 64 << 20
"""Outputs up to this size can lie in the cache themselves."""

_MOST_PLACES = 4


@dataclass(frozen=True, slots=True)
class Known:
    """An earlier result of the same inputs.

    Attributes:
        value: the result, as it was kept.
        made: when, in ISO 8601.
        is_there: whether the place that was asked for holds it already.
    """

    value: dict[str, Any]
    made: str
    is_there: bool
    _entry: Entry
    _place: dict[str, Any] | None


@dataclass
class Output:
    """The output of a command, and what the cache knows of it.

    Attributes:
        cache: where it is remembered.
        kind: of the command.
        out: the folder or file that it writes.
        describe: gives all that the output depends on, or None; asked once, and only if needed.
        names: the files and folders in ``out`` that are the output; all of ``out`` by default.
        claimed: those of them that must not be there before; all by default.
        keep_content: keep the files themselves in the cache, not only where they are.
        movable: whether the files are worth the same elsewhere.
    """

    cache: Cache
    kind: str
    out: Path
    describe: Callable[[], dict[str, Any] | None]
    names: tuple[str, ...] | None = None
    claimed: tuple[str, ...] | None = None
    keep_content: bool = False
    movable: bool = True

    @cached_property
    def inputs(self) -> dict[str, Any] | None:
        """All that the output depends on."""
        return self.describe()

    def look_up(self, overwrite: bool = False) -> Known | None:
        """Look for an earlier output of the same inputs, and change nothing.

        Args:
            overwrite: whether what is at ``out`` may be replaced.

        Returns:
            What is known; None if it must be made.

        Raises:
            CacheError: an entry is damaged.
        """
        if self.cache.folder is None:
            return None
        is_free = overwrite or self._is_free()
        if not is_free and self.cache.get("places", self._here) is None:
            return None  # before a model is hashed for nothing
        entry = self.cache.find(self.kind, self.inputs)
        if entry is None:
            return None
        value, places = entry.value["value"], entry.value["places"]
        here = next((place for place in places if place["path"] == self._path), None)
        if here is not None and _is_intact(here):
            return Known(value, entry.made, True, entry, here)
        if not is_free or not self.movable:
            return None
        intact = None if entry.names else next(filter(_is_intact, places), None)
        if intact is None and not entry.names:
            return None
        return Known(value, entry.made, False, entry, intact)

    def settle(self, known: Known) -> None:
        """Bring an earlier output to where it is asked for.

        Args:
            known: what :meth:`look_up` gave.

        Raises:
            OutputError: the place cannot be written to.
            CacheError: a file in the cache is damaged.
        """
        if known.is_there:
            return
        if known._place is not None:
            _copy(known._place, self.out, self.names)
        for name in known._entry.names:
            write_file(self.out / _checked(name), known._entry.content(name))
        self._remember(known.value, known._entry)

    def find(self, overwrite: bool = False) -> Known | None:
        """Look for an earlier output, and bring it to where it is asked for.

        Args:
            overwrite: whether what is at ``out`` may be replaced.

        Returns:
            What is known; None if it must be made.

        Raises:
            OutputError, CacheError: as :meth:`look_up` and :meth:`settle`.
        """
        known = self.look_up(overwrite)
        if known is not None:
            self.settle(known)
        return known

    def keep(self, value: dict[str, Any]) -> dict[str, Any]:
        """Remember an output that was just made.

        Args:
            value: what cannot be read from its files, as plain JSON values.

        Returns:
            The value.
        """
        self._remember(value, None)
        return value

    def _remember(self, value: dict[str, Any], entry: Entry | None) -> None:
        if self.cache.folder is None or self.inputs is None:
            return
        try:
            here = _marked(self.out, self.names)
            size = sum(mark[0] for mark in here["files"].values())
            names = here["files"] if self.keep_content and size <= KEPT_BYTES else ()
            files = {name: (self.out / name).read_bytes() for name in names}
        except OSError:  # somebody has taken it away already
            return
        others = [] if entry is None else filter(_is_intact, entry.value["places"])
        places = [here, *(place for place in others if place["path"] != self._path)]
        self.cache.put(
            self.kind, self.inputs, {"value": value, "places": places[:_MOST_PLACES]},
            files=files, made=None if entry is None else entry.made,
        )  # fmt: skip
        self.cache.put("places", self._here, {"kind": self.kind})

    @property
    def _path(self) -> str:
        return str(self.out.absolute())

    @property
    def _here(self) -> dict[str, Any]:
        return {"path": self._path}

    def _is_free(self) -> bool:
        try:
            for name in self.claimed or self.names or ("",):
                check_free(self.out / name)
        except OutputError:
            return False
        return True


def output_of(
    cache: Cache,
    kind: str,
    out: Path,
    *,
    models: Mapping[str, ModelSource | None],
    texts: Mapping[str, Texts | Iterable[str] | None],
    names: tuple[str, ...] | None = None,
    claimed: tuple[str, ...] | None = None,
    movable: bool = True,
    **settings: Any,
) -> Output:
    """Describe the output of a command that depends on models, texts and settings.

    Args:
        cache: where it is remembered.
        kind: of the command.
        out: the folder that it writes.
        models: by the name of their option; None where it was not given.
        texts: by the name of their option; None where it was not given.
        names: the files and folders in ``out`` that are the output; all of ``out`` by default.
        claimed: those of them that must not be there before; all by default.
        movable: whether the files are worth the same elsewhere.
        settings: all else, as values that JSON has or that give themselves as JSON.

    Returns:
        The output; models and texts are hashed when that is needed.
    """

    def describe() -> dict[str, Any] | None:
        plain = json.loads(json.dumps(settings, default=lambda value: value.to_json()))
        return inputs_of(cache, models, texts, **plain)

    return Output(cache, kind, out, describe, names=names, claimed=claimed, movable=movable)


def _marked(out: Path, names: tuple[str, ...] | None) -> dict[str, Any]:
    """The place of an output and the mark of each of its files; ``.`` where it is a file itself."""
    files: dict[str, Any] = {}
    for top in [out] if names is None else [out / name for name in names]:
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and not path.is_symlink():
                files[str(PurePosixPath(path.relative_to(out)))] = _mark(path)
    return {"path": str(out.absolute()), "files": files}


def _mark(path: Path) -> list[Any]:
    status = path.lstat()
    if status.st_size <= SMALL_BYTES:
        return [status.st_size, sha256_of(path)]
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _is_intact(place: dict[str, Any]) -> bool:
    path = Path(place["path"])
    try:
        return bool(place["files"]) and all(
            not (path / _checked(name)).is_symlink() and _mark(path / name) == mark
            for name, mark in place["files"].items()
        )
    except OSError:
        return False


def _checked(name: str) -> PurePosixPath:
    """A name from a file of the cache, which must not lead out of its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise OutputError(f"the cache names the file {name}, which leads out of its folder")
    return path


def _copy(place: dict[str, Any], out: Path, names: tuple[str, ...] | None) -> None:
    """Copy an output to another place, each folder and file whole or not at all."""
    source = Path(place["path"])
    files = [_checked(name) for name in place["files"]]
    with raise_output_error(out):
        if files == [PurePosixPath(".")]:
            with new_file(out, overwrite=True) as partial:
                _copy_file(source, partial)
            return
        # Results first: by them the place is known as this run's, should this be cut short.
        for top in (None,) if names is None else sorted(names, key=RESULTS_FILE.__ne__):
            inside = [name for name in files if top is None or name.parts[0] == top]
            target = out if top is None else out / top
            if inside == [PurePosixPath(str(top))]:
                with new_file(target, overwrite=True) as partial:
                    _copy_file(source / inside[0], partial)
            elif inside:
                with new_folder(target, overwrite=True) as folder:
                    for name in inside:
                        new = folder / (name if top is None else name.relative_to(top))
                        new.parent.mkdir(parents=True, exist_ok=True)
                        _copy_file(source / name, new)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file, by the kernel where the file system can: then large weights cost no time."""
    with source.open("rb") as old, target.open("xb") as new:
        with suppress(OSError):
            while os.copy_file_range(old.fileno(), new.fileno(), 1 << 30):
                pass
        old.seek(new.seek(0, os.SEEK_END))
        shutil.copyfileobj(old, new, 1 << 22)
