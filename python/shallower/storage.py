"""Writing so that nothing is ever half-written: a temporary sibling, then a rename."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


def check_free(path: Path, overwrite: bool = False) -> None:
    """Refuse a path that holds something already; an empty folder is free.

    Raises:
        OutputError: something is there and ``overwrite`` is off, or a parent is a file.
    """
    with _refusing(path):
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
        for parent in path.parents:
            if parent.exists():
                if not parent.is_dir():
                    raise OutputError(f"cannot write {path}: {parent} is not a folder")
                break


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, replacing one that is there.

    Raises:
        OutputError: the place cannot be written to.
    """
    path = Path(path)
    partial = _sibling(path, "partial")
    with _refusing(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder: a file name is needed")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a free temporary sibling path; what is there becomes ``path`` when the body succeeds.

    Raises:
        OutputError: ``path`` is a folder, or holds something already and ``overwrite`` is
            off, or the place cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder: a file name is needed")
    check_free(path, overwrite)
    partial = _sibling(path, "partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling folder that becomes ``path`` when the body succeeds.

    Raises:
        OutputError: ``path`` holds something already and ``overwrite`` is off, or the
            place cannot be written to.
    """
    path = Path(path)
    check_free(path, overwrite)
    partial = _sibling(path, "partial")
    with _refusing(path):
        partial.mkdir(parents=True)
    try:
        yield partial
        check_free(path, overwrite)
        with _refusing(path):
            _settle(partial)
            _put(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def _sibling(path: Path, suffix: str) -> Path:
    path = path.absolute()
    if not path.name:
        raise OutputError(f"cannot write {path}: it has no name")
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.{suffix}")


def _put(partial: Path, path: Path) -> None:
    if not path.exists() and not path.is_symlink():
        partial.rename(path)
        return
    displaced = _sibling(path, "replaced")
    path.rename(displaced)
    try:
        partial.rename(path)
    except OSError:
        displaced.rename(path)
        raise
    if displaced.is_dir() and not displaced.is_symlink():
        shutil.rmtree(displaced, ignore_errors=True)
    else:
        displaced.unlink()


def _settle(folder: Path) -> None:
    """Give every file the permissions that a new file has here, and flush it to disk."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
