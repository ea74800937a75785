"""Journals: records of work that outlive the process, a line each, appended whole or not at all."""

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CacheError
from ..values.schema import of_type


class Journal:
    """Records in a file of JSON lines, each behind its checksum.

    Several processes may append to one file: each holds it against the others for the one write
    that a record is. A last line without an end is what a kill left; it does not count, and is
    cut off by the next record.

    Args:
        path: the file, which is made with the first record.
        way_out: what to do about a damaged line, for its error.
    """

    def __init__(self, path: Path, way_out: str) -> None:
        self.path, self._way_out = path, way_out
        self._is_writable = True

    def read(self) -> list[dict[str, Any]]:
        """Give all records that were appended, by this process or another.

        Returns:
            The records, in their order.

        Raises:
            CacheError: a line is damaged.
        """
        try:
            with self._held(os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
                content = _all_of(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._damaged(str(error)) from error
        whole, _, _ = content.rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        return [self._record(number, line) for number, line in enumerate(lines, 1)]

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, which is there whole after any death of the process, or not at all.

        Where that cannot be, a warning says so, once: the work goes on.

        Args:
            record: plain JSON values.
        """
        if not self._is_writable:
            return
        body = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        line = _digest(body) + b" " + body + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            with self._held(flags, fcntl.LOCK_EX) as descriptor:
                _write_at_the_end(descriptor, line)
        except OSError as error:
            self._is_writable = False
            warnings.warn(f"no more is kept in {self.path}: {error}", stacklevel=2)

    @contextmanager
    def _held(self, flags: int, lock: int) -> Iterator[int]:
        descriptor = os.open(self.path, flags | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, lock)
            yield descriptor
        finally:
            os.close(descriptor)

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        digest, _, body = line.partition(b" ")
        try:
            if digest != _digest(body):
                raise ValueError("its checksum does not fit its content")
            return of_type(dict, json.loads(body))
        except (ValueError, TypeError, RecursionError) as error:
            raise self._damaged(f"line {number}: {error}") from error

    def _damaged(self, reason: str) -> CacheError:
        return CacheError(f"the cache's {self.path} is damaged ({reason}): {self._way_out}")


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:32].encode()


def _all_of(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _write_at_the_end(descriptor: int, line: bytes) -> None:
    """Write one line, behind the last whole one; what a full disk leaves of it is taken back."""
    end = _end_of_the_last_line(descriptor)
    os.ftruncate(descriptor, end)
    written = os.write(descriptor, line)
    if written < len(line):
        os.ftruncate(descriptor, end)
        raise OSError(f"only {written} of {len(line)} bytes were written")


def _end_of_the_last_line(descriptor: int) -> int:
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - (1 << 16))
        block = os.pread(descriptor, end - start, start)
        found = block.rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
