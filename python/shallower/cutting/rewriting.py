"""A checkpoint of safetensors copied with the values of some tensors changed, in constant memory.

Names, dtypes and shapes stay, so headers and index do. Files are written once, from their first
byte to their last: the kernel copies what does not change, and what changes passes in blocks.
"""

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from .._core import Checkpoint
from ..errors import ModelError, OutputError, raise_output_error, why
from ..models.place import CONFIG_FILE, read_json
from ..storage import check_room
from .checkpoint_files import INDEX_FILE, SINGLE_FILE, StoredTensor, carried_files, stored_tensors

BLOCK_BYTES = 16 << 20
"""Bytes that are copied or compared at once."""

_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

Read = Callable[[int], bytearray]
"""Reads so many bytes that follow those read before."""

Change = Callable[[Read], Iterator[Any]]
"""Reads a tensor from its first byte to its last, and yields buffers of the new bytes."""

Compare = Callable[[Read, Read], None]
"""Reads a tensor as it was and as it is, and raises if that is not what it should be."""

Report = Callable[[int], object]
"""Receives counts of bytes that were written or compared."""


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint on disk whose headers were read and checked against the sizes of its files."""

    folder: Path
    files: Mapping[str, Path]  # of its weights by name, links followed
    beside: Mapping[str, Path]  # other files by name: config, tokenizer, card, code
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> "StoredCheckpoint":
        """Read the headers of a folder with ``config.json`` and safetensors."""
        core = Checkpoint(folder)
        tensors = stored_tensors(core)
        files = {name: core.resolve(name) for name in _weight_files(folder)}
        beside = {**dict(carried_files(core)), CONFIG_FILE: core.resolve(CONFIG_FILE)}
        if set(files) != {SINGLE_FILE}:
            beside[INDEX_FILE] = core.resolve(INDEX_FILE)
        return cls(folder, files, beside, tensors)

    @property
    def num_bytes(self) -> int:
        """Size of the files of its weights."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def num_values(self) -> int:
        """Values of all its tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def pieces(self, file: str, changed: Mapping[str, Any]) -> Iterator[tuple[int, int, str]]:
        """Divide a file into (first byte, end, name): tensors of ``changed``, and "" between."""
        position, path = 0, self.files[file]
        places = ((one.piece, name) for name, one in self.tensors.items() if name in changed)
        for (_, start, stop), name in sorted(one for one in places if one[0].path == path):
            if start > position:
                yield position, start, ""
            yield start, stop, name
            position = stop
        size = path.stat().st_size
        if size > position:
            yield position, size, ""


def rewrite(
    stored: StoredCheckpoint,
    folder: Path,
    changes: Mapping[str, Change],
    *,
    report: Report = lambda _count: None,
) -> None:
    """Copy a checkpoint into a folder, with the values of some tensors of floats changed.

    What an interrupted call left in the folder is written anew. Raises ModelError for the source,
    OutputError for the folder.
    """
    with raise_output_error(folder):
        for name in (*stored.files, *stored.beside):
            (folder / name).unlink(missing_ok=True)
        check_room(folder, stored.num_bytes)
        for name, path in stored.beside.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    for name, path in stored.files.items():
        before = path.stat()
        with _opened(path) as source, _created(folder / name) as target:
            for start, stop, tensor in stored.pieces(name, changes):
                if not tensor:
                    _copy(source, target, start, stop=stop, report=report)
                    continue
                position = start
                for block in changes[tensor](_in_order(source, start)):
                    with memoryview(block).cast("B") as view:
                        _write(target, view, position)
                        position += len(view)
                        report(len(view))
                if position != stop:
                    raise ModelError(f"the new values of {tensor} are not as many as the old")
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ModelError(
                f"{path} changed while it was copied; run again when it is no longer being written"
            )


def compare(
    stored: StoredCheckpoint,
    folder: Path,
    checks: Mapping[str, Compare],
    *,
    report: Report = lambda _count: None,
) -> None:
    """Compare what :func:`rewrite` wrote into a folder with the checkpoint it was made from.

    ``checks`` are of the tensors that changed; every other byte must be the same. ModelError: a
    byte differs that should not, or a check fails.
    """
    for name, path in stored.files.items():
        made = folder / name
        if made.stat().st_size != path.stat().st_size:
            raise ModelError(f"{made} was not written as it should be: it has another size")
        with _opened(path) as before, _opened(made) as after:
            for start, stop, tensor in stored.pieces(name, checks):
                was, now = _in_order(before, start), _in_order(after, start)
                if tensor:
                    checks[tensor](was, now)
                    report(stop - start)
                    continue
                for count in _blocks(stop - start):
                    if was(count) != now(count):
                        raise ModelError(
                            f"{made} was not written as it should be: a byte between "
                            f"{start} and {stop} differs, where nothing was to change"
                        )
                    report(count)


def _weight_files(folder: Path) -> list[str]:
    """The names of the files that the core has found the weights in, and checked."""
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    return sorted(set(read_json(folder / INDEX_FILE)["weight_map"].values()))


def _blocks(total: int) -> Iterator[int]:
    for start in range(0, total, BLOCK_BYTES):
        yield min(BLOCK_BYTES, total - start)


def _in_order(file: BufferedReader, position: int) -> Read:
    """Give what reads on from a place in an open file."""

    def read(count: int) -> bytearray:
        nonlocal position
        data = bytearray(count)
        try:
            file.seek(position)
            got = file.readinto(data)
        except OSError as error:
            raise ModelError(f"cannot read {file.name}: {why(error, file.name)}") from error
        if got < count:
            raise ModelError(
                f"{file.name} ended early; run again when it is no longer being written"
            )
        position += count
        return data

    return read


def _write(file: FileIO, view: memoryview, position: int) -> None:
    written = 0
    with raise_output_error(str(file.name)):
        file.seek(position)
        while written < len(view):
            written += file.write(view[written:])


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ModelError(f"cannot read {path}: {why(error, path)}") from error
    with file:
        yield file


@contextmanager
def _created(path: Path) -> Iterator[FileIO]:
    """A new file: what is there was removed, a link itself too, so none is written through."""
    with raise_output_error(path):
        file = path.open("xb", buffering=0)
    with file:
        yield file


def _copy(source: BufferedReader, target: FileIO, start: int, *, stop: int, report: Report) -> None:
    """Copy bytes to the same place of another file, in the kernel where that is possible."""
    position = start
    while position < stop:
        count = min(BLOCK_BYTES, stop - position)
        done = _kernel_copy(source, target, position, count)
        if not done:
            with memoryview(_in_order(source, position)(count)) as view:
                _write(target, view, position)
            done = count
        position += done
        report(done)


def _kernel_copy(source: BufferedReader, target: FileIO, position: int, count: int) -> int:
    """The bytes that the kernel copied; 0 where it does not."""
    copy_range = getattr(os, "copy_file_range", None)  # of Linux
    if copy_range is None:
        return 0
    try:
        return int(copy_range(source.fileno(), target.fileno(), count, position, position))
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return 0
        raise OutputError(f"cannot write {target.name}: {why(error, str(target.name))}") from error
