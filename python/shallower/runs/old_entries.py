"""Entries of the cache that version 0.1 kept as files, which are only removed."""

import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import CacheError, why

_KIND = re.compile(r"[a-z_]{1,40}")
_HASH = re.compile(r"[0-9a-f]{64}")
_PARTIAL = r"|\.[0-9a-f]{64}(\.jsonl?)?\.[0-9a-f]{8}\.partial"
_ENTRY = re.compile(r"[0-9a-f]{64}\.jsonl?" + _PARTIAL)
_CONTENT = re.compile(r"[0-9a-f]{64}" + _PARTIAL)


def old_entries(folder: Path) -> Iterator[Path]:
    """Find the files ``KIND/HASH.json``, ``KIND/HASH.jsonl`` and ``KIND/HASH/HASH``."""
    for kind in _folders(folder, _KIND):
        yield from _files(kind, _ENTRY)
        for inside in _folders(kind, _HASH):
            yield from _files(inside, _CONTENT)


def clear_old(folder: Path) -> int:
    """Remove them and the folders that are empty then; follow no link; count the bytes.

    Raises CacheError if a file cannot be removed.
    """
    freed = 0
    try:
        for path in old_entries(folder):
            freed += path.lstat().st_size
            path.unlink()
        for kind in _folders(folder, _KIND):
            for inside in (*_folders(kind, _HASH), kind):
                if not any(inside.iterdir()):
                    inside.rmdir()
    except OSError as error:
        raise CacheError(f"cannot clear the cache: {why(error)}; remove {folder}") from error
    return freed


def _folders(folder: Path, names: re.Pattern[str]) -> list[Path]:
    return [path for path in _inside(folder, names) if path.is_dir() and not path.is_symlink()]


def _files(folder: Path, names: re.Pattern[str]) -> list[Path]:
    return [path for path in _inside(folder, names) if path.is_symlink() or path.is_file()]


def _inside(folder: Path, names: re.Pattern[str]) -> list[Path]:
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inside if names.fullmatch(path.name)]
