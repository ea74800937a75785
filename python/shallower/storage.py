"""Files and folders that appear whole or not at all: a temporary sibling, then a rename."""

import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import OutputError, raise_output_error, why
from .processes import check_alone, held, hidden, partial_folder


def check_free(path: Path, overwrite: bool = False) -> None:
    """Refuse a path that holds something already; an empty folder is free.

    With ``overwrite`` it refuses a folder that was not written here, a parent that is a file, and a
    place of another process.
    """
    check_alone(path)
    _check_taken(path, overwrite)


def _check_taken(path: Path, overwrite: bool) -> None:
    with raise_output_error(path):
        if path.absolute() == Path.cwd():
            raise OutputError(f"cannot write {path}: it is the current folder, name a new one")
        if path.is_dir() and not path.is_symlink():
            taken = any(path.iterdir())
        else:
            taken = path.exists() or path.is_symlink()
        if taken and not overwrite:
            raise OutputError(
                f"{path} exists already: choose another place, or replace it (overwrite=True, "
                "--overwrite)"
            )
        if path.is_dir():
            check_ours(path, foreign(path))
        for parent in path.parents:
            if parent.exists():
                if not parent.is_dir():
                    raise OutputError(f"cannot write {path}: {parent} is not a folder")
                break


RECORD = ".shallower.json"
"""The names and marks of all files that were written into a folder: nothing else is replaced."""

_MARKED = 8 << 20
"""Bytes at the begin of a file that its mark depends on, and at the end."""

RESULT_RECORD = "shallower_record.json"
"""How a result was made: written beside it once it is there."""


def check_ours(path: Path, foreign: Sequence[str]) -> None:
    """Refuse to replace a path together with ``foreign`` files, if there are any: OutputError."""
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"cannot replace {path}: no record says that shallower wrote {', '.join(foreign[:3])}"
            f"{more} there; choose another place, or move them away"
        )


def _recorded(folder: Path) -> dict[str, Any]:
    """The marks by name that the record in a folder has, None of what has none; or nothing."""
    try:
        files = json.loads((folder / RECORD).read_bytes())["files"]
        files = files if isinstance(files, dict) else dict.fromkeys(map(str, files))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {**files, RECORD: None, RESULT_RECORD: None}


def _mark(path: Path) -> str | None:
    """Hash the size, begin and end of a file; None of a record, which may be written anew."""
    if path.name in (RECORD, RESULT_RECORD):
        return None
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_MARKED))
        file.seek(max(file.tell(), size - _MARKED))
        digest.update(file.read())
    return digest.hexdigest()


def rewrite(path: Path, content: bytes) -> None:
    """Replace a file of a folder that was written here; it stays ours if it is unchanged."""
    ours, mark = [], _mark(path)
    for folder in path.absolute().parents[:2]:
        files, name = _recorded(folder), path.absolute().relative_to(folder).as_posix()
        if mark is not None and files.get(name) == mark:
            ours.append((folder, name, files))
    write_file(path, content)
    for folder, name, files in ours:
        write_file(folder / RECORD, _record({**files, name: _mark(path)}))


def _record(files: Mapping[str, Any]) -> bytes:
    kept = {name: files[name] for name in sorted(files) if name not in (RECORD, RESULT_RECORD)}
    return (json.dumps({"files": kept}, indent=1) + "\n").encode()


def foreign(folder: Path) -> list[str]:
    """List what lies in a folder and was not written there, or was changed since, by its names."""
    return list(_foreign(folder, _recorded(folder)))


def _foreign(folder: Path, recorded: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """The files and folders that are not recorded, by their names; of a folder only its own."""
    for entry in sorted(folder.iterdir()):
        name = f"{inside}{entry.name}"
        if not entry.is_dir() or entry.is_symlink():
            if name not in recorded:
                yield name
            elif recorded[name] is not None and recorded[name] != _mark(entry):
                yield f"{name} (as it is now)"
        elif any(one.startswith(f"{name}/") for one in recorded):
            yield from _foreign(entry, recorded, f"{name}/")
        else:
            yield f"{name}/"


def absolute(place: str) -> str:
    """A place that another process finds, whatever folder it is in; a hub id as it is."""
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place


def check_apart(path: str | Path, inputs: Iterable[object]) -> None:
    """Refuse to write to a place that is read, that lies in what is read, or that holds it.

    ``inputs`` are named by their text; None, and what is no place here, as a hub id, is passed
    over. Files are compared as the file system knows them, whatever links lead there.
    """
    path = Path(path)
    for given in filter(None, map(str, filter(None, inputs))):
        if how := _overlap(path, given):
            raise OutputError(
                f"cannot write {path}: it {how} {given}, which is read: choose another place"
            )


def _overlap(path: Path, given: str) -> str | None:
    """How a place overlaps one that is read, in words; None where they lie apart."""
    try:
        read = Path(given).expanduser().resolve(strict=True)
        inside, around = _is_in(path.resolve(), read), _is_in(read, path)
    except (OSError, ValueError, RuntimeError):  # no place of this system
        return None
    if inside:
        return "is" if around else "lies in"
    return "holds" if around else None


def _is_in(path: Path, other: Path) -> bool:
    """Whether a path is another one, or lies in it."""
    return other.exists() and any(
        one.exists() and one.samefile(other) for one in (path, *path.parents)
    )


def free_bytes(path: Path) -> int:
    """Count the free bytes where a path would be; OutputError if they cannot be."""
    with raise_output_error(path):
        there = next(parent for parent in path.absolute().parents if parent.exists())
        return shutil.disk_usage(there).free


def check_room(path: Path, num_bytes: int, temporary_bytes: int = 0) -> None:
    """Refuse, by OutputError, a path without room for so many bytes, or for temporary ones.

    What an interrupted run has left there counts towards them.
    """
    check_temporary(temporary_bytes)
    left = (partial_folder(path) / "folder").glob("*")
    if num_bytes - sum(file.stat().st_size for file in left) > (free := free_bytes(path)):
        sizes = f"{num_bytes / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free there"
        way_out = "make room, or choose another place (--out)"
        raise OutputError(f"cannot write {path}: {sizes}: {way_out}")


def check_temporary(num_bytes: int) -> None:
    """Refuse, by OutputError, temporary files of so many bytes that would find no room."""
    if num_bytes > (free := free_bytes(temporary())):
        sizes = f"{num_bytes / 1e6:,.1f} MB of temporary files, and {free / 1e6:,.1f} MB are free"
        raise OutputError(
            f"cannot begin: it takes {sizes} in {temporary().parent}: make room, or name another "
            f"folder (TMPDIR)"
        )


def temporary() -> Path:
    """The place of a temporary file."""
    return Path(tempfile.gettempdir(), "shallower")


def holds(path: Path, content: bytes) -> bool:
    """Whether a file has that very content already; OutputError if it cannot be read."""
    with raise_output_error(path):
        return path.is_file() and path.read_bytes() == content


def sha256_of(path: Path) -> str:
    """Hash the content of a file, in hexadecimal digits; OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, replacing one that is there."""
    path = Path(path)
    with (
        new_file(path, overwrite=True) as partial,
        raise_output_error(path),
        partial.open("xb") as file,
    ):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a free temporary sibling path; what is there becomes ``path`` when the body succeeds.

    A file that is at ``path`` is replaced then, if ``overwrite`` is on.
    """
    path = Path(path)
    partial = _sibling(path, "partial")
    with raise_output_error(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder: a file name is needed")
        _check_taken(path, overwrite)
        partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {why(error, path)}") from error
    finally:
        _remove(partial)


@contextmanager
def claimed(path: Path, overwrite: bool = False, num_bytes: int = 0) -> Iterator[None]:
    """Hold a path against other processes while the body makes what is written there.

    What would end long work in vain is found before it: as by :func:`check_free`, and ``num_bytes``
    that are not free.
    """
    path = Path(path)
    check_free(path, overwrite)
    with held(path):
        check_room(path, num_bytes)
        _clear(path)
        yield


@contextmanager
def new_folder(path: Path, overwrite: bool = False, num_bytes: int = 0) -> Iterator[Path]:
    """Give a temporary sibling folder that becomes ``path`` when the body succeeds.

    ``path`` does not exist yet or is an empty folder; else it is replaced then, if ``overwrite`` is
    on.
    """
    path = Path(path)
    with claimed(path, overwrite, num_bytes):
        partial = _sibling(path, "partial")
        with raise_output_error(path):
            partial.mkdir(parents=True)
        try:
            yield partial
            _put(partial, path, overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resumable_folder(path: Path, job: str, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder that becomes ``path`` when the body succeeds, and else stays for the next run.

    Work is done in the hidden sibling ``.NAME.partial``, which holds a journal and the folder to
    be. What it holds of the same ``job``, a text that identifies the work, is given again, and what
    it holds of another one is discarded; one process at a time may write. A body that leaves the
    folder empty leaves nothing.
    """
    path = Path(path)
    with _working(path, job, overwrite) as folder:
        yield folder
        _put(folder, path, overwrite)


@contextmanager
def resumable_file(path: Path, job: str, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder like :func:`resumable_folder`; its file ``path.name`` becomes ``path``.

    Whatever else the body leaves in the folder is for the next run, and goes when the body
    succeeds.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder: a file name is needed")
    with _working(path, job, overwrite) as folder:
        yield folder
        _check_taken(path, overwrite)
        with raise_output_error(path):
            (folder / path.name).replace(path)
            flush_folder(path.absolute().parent)
            shutil.rmtree(folder)


@contextmanager
def _working(path: Path, job: str, overwrite: bool) -> Iterator[Path]:
    """The folder of an earlier run of the same job, or an empty one, held against others."""
    check_free(path, overwrite)
    work = partial_folder(path)
    with held(path, reserved=False):
        _clear(path)
        with raise_output_error(path):
            folder = _begin(work, f"{path.absolute()}\n{job}")
        try:
            yield folder
        finally:
            if not folder.is_dir() or not any(folder.iterdir()):
                gone = _sibling(path, "partial")  # whole or not at all, should this be killed
                with suppress(OSError):
                    work.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def _begin(work: Path, job: str) -> Path:
    """The folder of an earlier run of this job, or an empty one."""
    journal, folder = work / _JOURNAL, work / "folder"
    found = journal.read_bytes() if journal.is_file() else None
    strangers = [entry for entry in work.iterdir() if _JOURNAL not in entry.name]
    if found is None and strangers:
        raise OutputError(f"{work} is in the way, and was left by something else: move it away")
    wanted = job.encode(errors="surrogateescape")
    if found != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        write_file(journal, wanted)
    folder.mkdir(exist_ok=True)
    return folder


_JOURNAL = "journal"


def _sibling(path: Path, suffix: str) -> Path:
    return hidden(path, f"{suffix}.{secrets.token_hex(4)}")


def _clear(path: Path) -> None:
    """Remove what a process that was killed left of a path, which this one holds now."""
    name = partial_folder(path).name
    for left in path.absolute().parent.glob(f"{glob.escape(name)}.{'[0-9a-f]' * 8}"):
        _remove(left)


def _put(folder: Path, path: Path, overwrite: bool) -> None:
    """Make a complete folder ``path``, in the place of what is there."""
    _check_taken(path, overwrite)
    with raise_output_error(path):
        _settle(folder)
        displaced = _sibling(path, "replaced")
        if path.exists() or path.is_symlink():
            path.rename(displaced)
        try:
            folder.rename(path)
        except OSError:
            with suppress(FileNotFoundError):
                displaced.rename(path)
            raise
        flush_folder(path.absolute().parent)
    _remove(displaced)


def _remove(path: Path) -> None:
    """Delete a file or a link, or a folder with all that is in it; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # there is none, or its file system can only be read
        path.unlink()


def _settle(folder: Path) -> None:
    """Record all files, give them the permissions that a new file has here, and flush them."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    (folder / RECORD).write_bytes(
        _record({file.relative_to(folder).as_posix(): _mark(file) for file in files})
    )
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)
            flush_file(file)
    flush_folder(folder)


def flush_file(path: Path) -> None:
    """Put on disk what was written into a file."""
    with path.open("r+b") as opened:  # Windows flushes none that is only read
        os.fsync(opened.fileno())


def flush_folder(folder: Path) -> None:
    """Put the names in a folder on disk, where folders can be flushed; not its files."""
    if not hasattr(os, "O_DIRECTORY"):  # as on Windows
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
