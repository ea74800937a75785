"""The cache: what was measured on the same model, texts and settings is not measured again.

An entry is found by a hash of all that it depends on, so a changed model or text finds none, and
nothing ever has to be declared stale. Entries appear whole or not at all, so that neither a kill
nor a second process can damage one.
"""

import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import CacheError, OutputError
from ..storage import write_file
from ..values.schema import of_type
from .journal import Journal

FOLDER_VARIABLE = "SHALLOWER_CACHE"
"""The variable that names the folder of the cache."""

WAY_OUT = "remove all entries (shallower cache --clear), or measure anew (--no-cache)"

_FORMAT = ["shallower.cache", 1]
_KIND = re.compile(r"[a-z_]{1,40}")
_ENTRY = re.compile(r"([0-9a-f]{64})\.jsonl?")
_HASH = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"\.[0-9a-f]{64}(\.jsonl?)?\.[0-9a-f]{8}\.partial")


def cache_folder() -> Path | None:
    """Find the folder of the cache, which need not be there.

    Returns:
        ``SHALLOWER_CACHE``, else ``shallower`` in ``XDG_CACHE_HOME``, else in ``~/.cache``; None
        where no home is known.
    """
    own, shared = os.environ.get(FOLDER_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser().absolute()
        caches = Path(shared) if shared else Path.home() / ".cache"
        return caches.absolute() / "shallower"
    except RuntimeError:
        return None


def open_cache(no_cache: bool = False) -> "Cache":
    """Open the cache of this user.

    Args:
        no_cache: give one that finds and keeps nothing.

    Returns:
        The cache; its folder is made with its first entry.
    """
    return Cache(None if no_cache else cache_folder())


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the cache, whole and checked.

    Attributes:
        value: what was measured, as plain JSON values.
        made: when, in ISO 8601.
    """

    value: dict[str, Any]
    made: str
    _files: Mapping[str, tuple[Path, str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the files that were kept with the entry."""
        return list(self._files)

    def content(self, name: str) -> bytes:
        """Read a file that was kept with the entry.

        Args:
            name: of the file, one of ``names``.

        Returns:
            Its bytes.

        Raises:
            CacheError: it is not there any more, or was changed.
        """
        path, digest = self._files[name]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _damaged(path, str(error)) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise _damaged(path, "its checksum does not fit its content")
        return content


@dataclass(frozen=True, slots=True)
class KindUsage:
    """The entries of one kind: their number, bytes on disk, and when they were last changed."""

    kind: str
    entries: int
    num_bytes: int
    oldest: float
    newest: float


@dataclass(frozen=True, slots=True)
class Cache:
    """Results by what they depend on.

    Every method takes ``inputs``: plain JSON values that hold all that the result depends on, or
    None where that cannot be told, and then nothing is found and nothing kept.

    Attributes:
        folder: where the entries lie, as ``KIND/HASH.json``; None for a cache that is off.
    """

    folder: Path | None

    def key(self, kind: str, inputs: Mapping[str, Any]) -> str:
        """Hash what a result depends on.

        Args:
            kind: of the result, in lower case.
            inputs: all that it depends on.

        Returns:
            The SHA-256 of the canonical JSON, in hexadecimal.
        """
        return hashlib.sha256(_canonical([_FORMAT, kind, inputs])).hexdigest()

    def get(self, kind: str, inputs: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Look a result up.

        Args:
            kind: of the result.
            inputs: all that it depends on.

        Returns:
            The value that was put, or None.

        Raises:
            CacheError: its entry is damaged.
        """
        entry = self.find(kind, inputs)
        return None if entry is None else entry.value

    def find(self, kind: str, inputs: Mapping[str, Any] | None) -> Entry | None:
        """Look an entry up: a result, when it was made, and the files that were kept with it.

        Args:
            kind: of the result.
            inputs: all that it depends on.

        Returns:
            The entry, or None.

        Raises:
            CacheError: it is damaged.
        """
        if self.folder is None or inputs is None:
            return None
        path = self._place(self.folder, kind, inputs)
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _damaged(path, str(error)) from error
        try:
            return _read(content, kind, inputs, beside=path.with_suffix(""))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged(path, str(error)) from error

    def put(
        self,
        kind: str,
        inputs: Mapping[str, Any] | None,
        value: Mapping[str, Any],
        *,
        files: Mapping[str, bytes] | None = None,
        made: str | None = None,
    ) -> None:
        """Keep a result. Where that cannot be, a warning says so: the result itself is not lost.

        Args:
            kind: of the result.
            inputs: all that it depends on.
            value: the result, as plain JSON values.
            files: contents of files to keep with it, by name.
            made: when it was measured, in ISO 8601; now by default.
        """
        if self.folder is None or inputs is None:
            return
        path = self._place(self.folder, kind, inputs)
        kept = {
            name: hashlib.sha256(content).hexdigest() for name, content in (files or {}).items()
        }
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        entry = {
            "format": _FORMAT, "kind": kind, "made": made or now, "inputs": inputs, "value": value,
            "files": kept,
        }  # fmt: skip
        entry["sha256"] = hashlib.sha256(_canonical(entry)).hexdigest()
        try:
            for name, content in (files or {}).items():
                write_file(path.with_suffix("") / kept[name], content)
            write_file(path, json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        except OutputError as error:
            reason = getattr(error.__cause__, "strerror", None) or error
            # From one line and in the same words, so that it is shown once.
            warnings.warn(f"nothing is kept in the cache {self.folder}: {reason}", stacklevel=1)

    def journal(self, kind: str, inputs: Mapping[str, Any] | None) -> Journal | None:
        """Open the records of work that may be interrupted.

        Args:
            kind: of the work.
            inputs: all that its records depend on.

        Returns:
            The journal, which several processes may append to; None if nothing is kept.
        """
        if self.folder is None or inputs is None:
            return None
        return Journal(self._place(self.folder, kind, inputs).with_suffix(".jsonl"), WAY_OUT)

    def usage(self) -> list[KindUsage]:
        """Count the entries and their bytes, by kind.

        Raises:
            CacheError: the folder cannot be read.
        """
        found = []
        for kind in self._kinds():
            own = {path: _status(path) for path in _own(kind) if not _is_folder(path)}
            there = {path: status for path, status in own.items() if status}
            times = [s.st_mtime for path, s in there.items() if _ENTRY.fullmatch(path.name)]
            if times:
                size = sum(status.st_size for status in there.values())
                found.append(KindUsage(kind.name, len(times), size, min(times), max(times)))
        return found

    def clear(self) -> int:
        """Remove every file that a cache made, and the folders that are empty then.

        What else lies there stays, and no link is followed. Other processes may read, write and
        clear meanwhile: what they write after that may stay.

        Returns:
            The bytes that were freed.

        Raises:
            CacheError: a file cannot be removed, or a folder that is not empty has the name of
                one; all others are removed.
        """
        freed, foreign = 0, []
        for kind in self._kinds():
            try:
                for path in _own(kind):
                    if not _is_folder(path):
                        freed += _remove(path)
                    elif not _remove_if_empty(path):
                        foreign.append(path)
                for folder in (*_folders(kind), kind):
                    _remove_if_empty(folder)
            except OSError as error:
                raise CacheError(f"cannot clear the cache: {error}; remove {kind}") from error
        if foreign:
            raise CacheError(
                f"cannot clear the cache: {foreign[0]} should be a file, and is a folder that no "
                f"cache made and that is not empty; remove {foreign[0]}"
            )
        if self.folder is not None:
            _remove_if_empty(self.folder)
        return freed

    def _place(self, folder: Path, kind: str, inputs: Mapping[str, Any]) -> Path:
        assert _KIND.fullmatch(kind)
        return folder / kind / f"{self.key(kind, inputs)}.json"

    def _kinds(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        try:
            inside = _inside(self.folder)
        except OSError as error:
            raise CacheError(f"cannot read the cache {self.folder}: {error}") from error
        return [path for path in inside if _KIND.fullmatch(path.name) and _is_folder(path)]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _read(content: bytes, kind: str, inputs: Mapping[str, Any], *, beside: Path) -> Entry:
    """An entry of its bytes; raises whatever is wrong with them."""
    stored = of_type(dict, json.loads(content))
    digest = stored.pop("sha256")
    if hashlib.sha256(_canonical(stored)).hexdigest() != digest:
        raise ValueError("its checksum does not fit its content")
    asked = [_FORMAT, kind, json.loads(_canonical(inputs))]
    if [stored["format"], stored["kind"], stored["inputs"]] != asked:
        raise ValueError("it is the entry of something else")
    files = {name: (beside / digest, digest) for name, digest in stored["files"].items()}
    if not all(_HASH.fullmatch(digest) for _, digest in files.values()):
        raise ValueError("a name of its files is not a hash")
    return Entry(of_type(dict, stored["value"]), of_type(str, stored["made"]), files)


def _damaged(path: Path, reason: str) -> CacheError:
    return CacheError(f"the cache's {path} is cut off or damaged ({reason}): {WAY_OUT}")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _folders(kind: Path) -> list[Path]:
    """The folders of files that were kept with entries."""
    return [path for path in _inside(kind) if _HASH.fullmatch(path.name) and _is_folder(path)]


def _own(kind: Path) -> Iterator[Path]:
    """What has the name of a file of a kind that a cache made, or one that was killed at it."""
    for folder, names in ((kind, _ENTRY), *((folder, _HASH) for folder in _folders(kind))):
        for path in _inside(folder):
            if names.fullmatch(path.name) or _PARTIAL.fullmatch(path.name):
                yield path


# Another process may remove or write any of this at any time.
def _inside(folder: Path) -> list[Path]:
    """What lies in a folder; nothing if it is gone."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _status(path: Path) -> os.stat_result | None:
    """The size and times of a file; None if it is gone."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _remove(path: Path) -> int:
    """Remove a file, and tell its bytes; 0 if it is gone."""
    status = _status(path)
    path.unlink(missing_ok=True)
    return status.st_size if status else 0


def _remove_if_empty(folder: Path) -> bool:
    """Remove a folder unless something is in it; tell whether nothing is."""
    if _inside(folder):
        return False
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise
        return error.errno == errno.ENOENT
    return True
