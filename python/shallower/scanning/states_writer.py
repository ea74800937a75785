"""StatesWriter: hidden states written to a file while they are scanned, in constant memory.

The number of samples is known at the end only: room is left for the header, which is written
last. Until then all lies in a hidden folder beside the file, with a mark for each checkpoint of
the scan, so that a killed one goes on.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError, ScanError, StatesError
from ..storage import check_free, partial_folder, raise_output_error, resumable_file
from ..values.identity import ModelIdentity, TextsIdentity
from ..values.plan import NAMED_REJECTIONS, Rejection
from ..values.positions import Positions
from .builder import Part, as_array
from .states_file import DTYPES, FORMAT, HIDDEN_STATES, SAMPLES, Origin

HEADER_BYTES = 1 << 16
"""Bytes before the states in the file."""

_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_MARKS = "marks"


@contextmanager
def keep_states_in(
    path: str | Path,
    model: ModelIdentity | None = None,
    positions: Positions | None = None,
    *,
    overwrite: bool = False,
) -> Iterator["StatesWriter"]:
    """Write a safetensors file of states, whole or not at all; the body must finish the writer.

    A body that fails leaves what it marked beside ``path``, for the next run. OutputError:
    something is at ``path`` already, or it cannot be written to.
    """
    path = check_keepable(path, overwrite=overwrite)
    with (
        resumable_file(path, FORMAT, overwrite) as folder,
        StatesWriter(path, folder, Origin(model, positions=positions)) as writer,
    ):
        try:
            yield writer
            if not writer.finished:
                raise RuntimeError(f"the states in {path} were not finished")
        except BaseException:
            writer.leave()
            raise


def check_keepable(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse a path that does not end in ``.safetensors`` or is taken: OutputError."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: states are kept in a file whose name ends in .safetensors")
    if path.is_dir():
        raise OutputError(f"{path} is a folder: a file name is needed")
    check_free(path, overwrite)
    return path


class StatesWriter:
    """States on their way to a file; :func:`keep_states_in` makes one.

    It begins anew, unless :meth:`resume` comes first.
    """

    def __init__(self, path: Path, folder: Path, origin: Origin) -> None:
        self._path, self._folder = path, folder
        self._origin = origin
        self._shape: list[int] = []
        self._dtype = ""
        self._count = 0
        self._began = False
        self.finished = False
        self._header(self._origin, spare=HEADER_BYTES // 2)
        with raise_output_error(path):
            self._states = (folder / path.name).open("ab")
            self._samples = (folder / SAMPLES).open("ab")

    def __enter__(self) -> "StatesWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._states, self._samples):
            with suppress(OSError):  # what could not be written has been refused
                file.close()

    def take(self, part: Part) -> None:
        """Write the states and samples of a part, as :meth:`add` does."""
        self.add(part.states, part.samples, state_first=part.state_first)

    def add(self, states: Any, samples: NDArray[np.int64], *, state_first: bool = False) -> None:
        """Write a batch, (B, L+1, D), or (L+1, B, D) if ``state_first``.

        ``samples`` are (B,) indices of the texts; those of one text follow each other. StatesError:
        the batch differs from the first one in shape or dtype. OutputError: it cannot be written,
        as when the disk is full.
        """
        array = as_array(states)
        array = array.transpose(1, 0, 2) if state_first else array
        self._begin()
        if not self._count:
            self._shape, self._dtype = list(array.shape[1:]), _NAMES[array.dtype]
        if (list(array.shape[1:]), _NAMES[array.dtype]) != (self._shape, self._dtype):
            raise StatesError(
                f"cannot keep states of shape {array.shape[1:]} and dtype {array.dtype}: those "
                f"before are of shape {tuple(self._shape)} and dtype {self._dtype}"
            )
        with self._raise_output_error():
            self._states.write(np.ascontiguousarray(array).data.cast("B"))
            self._samples.write(np.asarray(samples, dtype="<i8").tobytes())
        self._count += len(array)

    def mark(self, texts: TextsIdentity) -> None:
        """Flush all states so far, of these texts, so that :meth:`resume` finds them."""
        self._begin()
        mark = {
            "texts": asdict(texts),
            "count": self._count,
            "shape": self._shape,
            "dtype": self._dtype,
        }
        with self._raise_output_error():
            for file in (self._states, self._samples):
                _flush(file)
            with (self._folder / _MARKS).open("ab") as marks:
                marks.write(json.dumps({**self._job(), **mark}).encode() + b"\n")
                _flush(marks)

    def resume(self, texts: TextsIdentity) -> None:
        """Continue behind the states of these texts that an earlier run has marked.

        ScanError: there is no such mark, or less than it counts.
        """
        wanted = {**self._job(), "texts": asdict(texts)}
        found = None
        with raise_output_error(self._path):
            path = self._folder / _MARKS
            lines = path.read_bytes().splitlines() if path.is_file() else []
        for line in lines:
            with suppress(ValueError):  # the last one may be cut off
                mark = json.loads(line)
                if all(mark.get(name) == value for name, value in wanted.items()):
                    found = mark
        if found is None:
            raise ScanError(f"its states were not kept in {partial_folder(self._path)}")
        self._count, self._shape, self._dtype = (
            found[name] for name in ("count", "shape", "dtype")
        )
        with raise_output_error(self._path):
            if any(file.seek(0, os.SEEK_END) < end for file, end in self._ends()):
                raise ScanError(
                    f"{partial_folder(self._path)} holds fewer than its {self._count} states"
                )
            self._cut()

    def finish(
        self, texts: TextsIdentity, num_rejected: int, rejections: Sequence[Rejection]
    ) -> None:
        """Complete the file; StatesError if there are no states."""
        if not self._count:
            raise StatesError("there are no states to keep")
        origin = replace(
            self._origin,
            texts=(texts,),
            num_rejected=num_rejected,
            rejections=tuple(rejections[:NAMED_REJECTIONS]),
        )
        with self._raise_output_error():
            self._samples.flush()
            with (self._folder / SAMPLES).open("rb") as samples:
                shutil.copyfileobj(samples, self._states)
            _flush(self._states)
            with (self._folder / self._path.name).open("r+b") as file:
                file.write(self._header(origin))
                _flush(file)
        self.finished = True

    def leave(self) -> None:
        """Leave what was marked for another run, and nothing else."""
        if not (self._folder / _MARKS).exists():
            for path in self._folder.iterdir():
                path.unlink()

    def _job(self) -> dict[str, Any]:
        described = asdict(self._origin)
        return {name: described[name] for name in ("model", "positions")}

    def _begin(self) -> None:
        if not self._began:
            with self._raise_output_error():
                (self._folder / _MARKS).unlink(missing_ok=True)
                self._cut()

    def _cut(self) -> None:
        for file, end in self._ends():
            file.truncate(end)
        self._began = True

    def _ends(self) -> list[tuple[BinaryIO, int]]:
        """Pairs of a file, and where it ends if it holds the samples counted."""
        states = HEADER_BYTES + self._count * self._sample_bytes()
        return [(self._states, states), (self._samples, 8 * self._count)]

    def _sample_bytes(self) -> int:
        if not self._shape:
            return 0
        return self._shape[0] * self._shape[1] * np.dtype(DTYPES[self._dtype]).itemsize

    def _header(self, origin: Origin, spare: int = 0) -> bytes:
        states = self._count * self._sample_bytes()
        tensors = {
            "__metadata__": {FORMAT: origin.to_json()},
            HIDDEN_STATES: {
                "dtype": self._dtype,
                "shape": [self._count, *self._shape],
                "data_offsets": [0, states],
            },
            SAMPLES: {
                "dtype": "I64",
                "shape": [self._count],
                "data_offsets": [states, states + 8 * self._count],
            },
        }
        text = json.dumps(tensors, ensure_ascii=False).encode()
        room = HEADER_BYTES - 8
        if len(text) > room - spare:
            raise OutputError(
                f"cannot write {self._path}: what is known of the model and the texts takes "
                f"{len(text)} bytes, more than the {room - spare} left for it: shorten the "
                f"model's name"
            )
        return room.to_bytes(8, "little") + text.ljust(room)

    @contextmanager
    def _raise_output_error(self) -> Iterator[None]:
        try:
            with raise_output_error(self._path):
                yield
        except OutputError as error:
            way = ""
            if (self._folder / _MARKS).exists():
                way = (
                    f"; do the same again to go on where it was, or delete "
                    f"{partial_folder(self._path)}"
                )
            raise OutputError(f"{error}{way}") from error


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
