"""StatesFile: hidden states read part by part in constant memory.

A ``.npy`` file holds one array (samples, L+1, D). A ``.safetensors`` file holds one tensor of that
shape. It may name the text of every sample, and an :class:`Origin`, the model and the texts.
Nothing in a header is believed before it fits the length of the file.

Files are read, not mapped: one thread reads a part while the core compares the last one. So memory
is constant, and a file that shrinks is an error instead of a signal. A mapping was faster from the
page cache and several times slower from the disk. Safetensors' own reader maps, and without torch
it gives no bfloat16.
"""

import io
import json
import math
import os
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import parse_header
from ..errors import PositionsError, StatesError, why
from ..processes import processors
from ..values.identity import ModelIdentity, TextsIdentity
from ..values.plan import Rejection
from ..values.positions import Positions
from ..values.schema import fields_of, of_type
from .builder import Chunk

FORMAT = "shallower.states.1"
"""The key of a states file's metadata."""

HIDDEN_STATES = "hidden_states"
"""The name of the tensor of states."""

SAMPLES = "samples"
"""The name of the tensor that numbers the samples, (samples,) int64."""

SEQUENCES = "sequences"
"""The name of the tensor with the sequence of every sample, (samples,) int64."""

DTYPES: Mapping[str, str] = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
"""Dtypes of states in a safetensors file, and how the core takes them."""

BUFFER_BYTES = 4 << 20
"""Bytes that are read at a time. States that are still in the caches are compared faster."""

MAX_BUFFER_BYTES = 64 << 20
"""Bytes at most, where many threads need samples to share."""

AHEAD_BYTES = 64 << 20
"""Bytes that the system fetches ahead; they are not memory of the process."""

SAMPLES_A_THREAD = 4
"""Samples of a part that every thread should get."""

PART_SAMPLES = 1 << 16
"""Samples of a part at most, however small they are."""

_MAX_HEADER_BYTES = 16 << 20
_MAX_NPY_HEADER_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class Origin:
    """What a states file says of where its states come from.

    Attributes:
        model: the model that the states come from, if known.
        texts: the texts behind them.
        num_rejected: texts that never became states.
        rejections: the first of those, by name.
        positions: which tokens of the texts the samples are, if that is known.
    """

    model: ModelIdentity | None = None
    texts: tuple[TextsIdentity, ...] = ()
    num_rejected: int = 0
    rejections: tuple[Rejection, ...] = ()
    positions: Positions | None = None

    def to_json(self) -> str:
        """The origin as JSON, for the metadata of a file."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Origin":
        """Read an origin from the metadata of a file.

        ValueError, TypeError, KeyError, RecursionError or PositionsError: it is damaged.
        """
        data = of_type(dict, json.loads(text))
        if not 0 <= of_type(int, data["num_rejected"]) < 2**31:
            raise ValueError(f"num_rejected is {data['num_rejected']}")
        return cls(**fields_of(cls, data))


class StatesFile:
    """A file of states with its header read and checked; a context manager.

    ``path`` ends in ``.npy`` or ``.safetensors``; links are followed. ``tensor`` is by default
    ``hidden_states``, or else the only one of three axes. StatesError: there is no such file, it is
    truncated, or it is not a file of states.

    Attributes:
        shape: samples, L+1, D.
        dtype: float16, float32, float64, or uint16 for the bits of bfloat16.
        origin: where the states come from, as far as it is known.
    """

    def __init__(self, path: str | Path, tensor: str | None = None) -> None:
        self.path = Path(path)
        self.origin = Origin()
        self._columns: dict[str, int] = {}
        if self.path.suffix not in (".npy", ".safetensors"):
            raise StatesError(
                f"cannot read states from {path}: expected a file that ends in .npy or .safetensors"
            )
        if tensor is not None and self.path.suffix == ".npy":
            raise StatesError(f"{path} holds one array without a name, not the tensor {tensor!r}")
        if not self.path.is_file():
            raise StatesError(f"there is no states file {path}")
        with ExitStack() as opened:
            try:
                self._file = opened.enter_context(self.path.open("rb"))
                self._stamp = self._stamp_now()
                if self.path.suffix == ".npy":
                    self._read_npy()
                else:
                    self._read_safetensors(tensor)
            except OSError as error:
                raise StatesError(f"cannot read {path}: {why(error, path)}") from error
            opened.pop_all()

    def __enter__(self) -> "StatesFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return math.prod(self.shape) * self.dtype.itemsize

    def parts(
        self, threads: int | None = None, sequences: NDArray[np.int64] | None = None
    ) -> Generator[Chunk, None, None]:
        """Read all samples in their order; one part is read while the last one is worked on.

        ``threads`` share a part, all by default; ``sequences`` are (samples,) int64. The next part
        but one overwrites the states of a part. StatesError: the file ended early, was changed, or
        cannot be read.
        """
        sample_bytes = self.num_bytes // len(self)
        shared = SAMPLES_A_THREAD * (threads or processors()) * sample_bytes
        room = min(max(shared, BUFFER_BYTES), MAX_BUFFER_BYTES)
        step = min(max(1, room // sample_bytes), PART_SAMPLES, len(self))
        try:
            buffers = [np.empty((step, *self.shape[1:]), self.dtype) for _ in range(2)]
        except MemoryError as error:
            raise StatesError(
                f"{self.path}: a sample of shape {self.shape[1:]} takes {sample_bytes} bytes, more "
                f"than there is memory for"
            ) from error
        with ThreadPoolExecutor(1, "states") as reader:
            reading = reader.submit(self._part, buffers[0], 0, sequences)
            for start in range(step, len(self) + step, step):
                part = reading.result()
                if start < len(self):
                    buffers.reverse()
                    reading = reader.submit(self._part, buffers[0], start, sequences)
                yield part
        if self._stamp_now() != self._stamp:
            raise StatesError(
                f"{self.path} changed while it was read; run again when it is no longer being "
                f"written"
            )

    def sequences(self) -> NDArray[np.int64] | None:
        """The sequence of every sample, (samples,) int64.

        None if every sample is its own sequence.
        """
        positions = self.origin.positions
        name = SEQUENCES if positions is None else SAMPLES
        if name not in self._columns or (positions and positions.one_a_text):
            return None
        return self._read(self._columns[name], np.empty(len(self), np.int64))

    def _part(self, buffer: NDArray[Any], start: int, sequences: NDArray[np.int64] | None) -> Chunk:
        samples = np.arange(start, min(start + len(buffer), len(self)))
        states = buffer[: len(samples)]
        offset = self._start + start * buffer[:1].nbytes
        if hasattr(os, "posix_fadvise"):  # so that the disk does not wait for the core
            ahead = offset + AHEAD_BYTES, states.nbytes
            os.posix_fadvise(self._file.fileno(), *ahead, os.POSIX_FADV_WILLNEED)
        if SAMPLES in self._columns:
            self._read(self._columns[SAMPLES] + start * 8, samples)
        return Chunk(
            self._read(offset, states),
            samples,
            steps=len(samples),
            sequences=None if sequences is None else sequences[start : start + len(samples)],
        )

    def _read(self, offset: int, room: NDArray[Any]) -> NDArray[Any]:
        try:
            self._file.seek(offset)
            got = self._file.readinto(room.data.cast("B"))
        except OSError as error:
            raise StatesError(f"cannot read {self.path}: {why(error, self.path)}") from error
        if got < room.nbytes:
            raise StatesError(
                f"{self.path} ended early: it holds {self._stamp_now()[0]} bytes, and held "
                f"{self._stamp[0]}; run again when it is no longer being written"
            )
        return room

    def _stamp_now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _read_npy(self) -> None:
        beginning = io.BytesIO(self._file.read(_MAX_NPY_HEADER_BYTES))
        try:
            version = np.lib.format.read_magic(beginning)
            if version not in _NPY_HEADERS:
                raise ValueError(f"its version is {version}")
            shape, in_fortran, dtype = _NPY_HEADERS[version](beginning)
        except Exception as error:  # whatever numpy raises of a header that is none
            raise StatesError(
                f"{self.path} is truncated, or is no .npy file of version 1 to 3: {why(error)}; "
                f"save it again by numpy.save"
            ) from error
        if in_fortran:
            raise StatesError(
                f"{self.path} is in Fortran's order: save np.ascontiguousarray of the array"
            )
        self._take("its array", dtype.str, shape, start=beginning.tell())
        expected, size = self._start + self.num_bytes, self._stamp[0]
        if size != expected:
            fault = "is truncated" if size < expected else "is longer than its header says"
            raise StatesError(
                f"{self.path} {fault}: an array of shape {shape} and dtype {dtype} makes "
                f"{expected} bytes, the file has {size}"
            )

    def _read_safetensors(self, wanted: str | None) -> None:
        size = self._stamp[0]
        length = int.from_bytes(self._file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise StatesError(
                f"{self.path} is truncated, or not a safetensors file: its header claims {length} "
                f"bytes, the file has {size}, and at most {_MAX_HEADER_BYTES} are read"
            )
        try:
            metadata, tensors = parse_header(self._file.read(length), size - 8 - length)
            if FORMAT in metadata:
                self.origin = Origin.from_json(metadata[FORMAT])
        except (ValueError, TypeError, KeyError, RecursionError, PositionsError) as error:
            raise StatesError(f"{self.path} is truncated or damaged: {error}") from error
        name, dtype, shape, start, _ = self._choose(tensors, wanted)
        self._take(f"the tensor {name}", dtype, shape, start=8 + length + start)
        for column, column_dtype, column_shape, column_start, _ in tensors:
            if column in (SAMPLES, SEQUENCES) and column != name:
                if (column_dtype, column_shape) != ("I64", shape[:1]):
                    raise StatesError(
                        f"{self.path}: the tensor {column} is of dtype {column_dtype} and shape "
                        f"{column_shape}, expected I64 and {shape[:1]}"
                    )
                self._columns[column] = 8 + length + column_start
        model = self.origin.model
        if model and model.num_layers != self.shape[1] - 1:
            raise StatesError(
                f"{self.path} is damaged: it holds {self.shape[1]} states a sample, and its model "
                f"has {model.num_layers} layers"
            )

    def _choose(self, tensors: list[Any], wanted: str | None) -> Any:
        by_name = {tensor[0]: tensor for tensor in tensors}
        chosen = by_name.get(wanted or HIDDEN_STATES)
        if chosen is None and wanted is None:
            fitting = [tensor for tensor in tensors if len(tensor[2]) == 3]
            chosen = fitting[0] if len(fitting) == 1 else None
        if chosen is None:
            named = ", ".join(list(by_name)[:10]) + (", ..." if len(by_name) > 10 else "")
            looked = wanted or f"{HIDDEN_STATES}, nor a single one of three axes"
            raise StatesError(
                f"{self.path} has no tensor {looked}: it holds {named or 'none'}; name the one of "
                f"shape (samples, L+1, D) (tensor=, --tensor)"
            )
        return chosen

    def _take(self, name: str, stored: str, shape: Any, *, start: int) -> None:
        """Take what a header says of the states, if it is right."""
        dtype = DTYPES.get(stored, stored)
        if dtype not in DTYPES.values():
            raise StatesError(
                f"{self.path}: {name} is of dtype {stored}, expected one of "
                f"{', '.join(DTYPES)}, little-endian; of .npy files uint16 is read as bits of BF16"
            )
        if len(shape) != 3:
            raise StatesError(
                f"{self.path}: {name} has the shape {tuple(shape)}, expected three axes "
                f"(samples, L+1, D)"
            )
        if not all(type(axis) is int and axis > 0 for axis in shape):
            raise StatesError(f"{self.path} holds states of shape {tuple(shape)}: there are none")
        self.shape, self.dtype, self._start = tuple(shape), np.dtype(dtype), start


_NPY_HEADERS: Mapping[Any, Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # in UTF-8, which matters to names of fields alone
}
