"""StatesFile: hidden states read part by part in constant memory.

A ``.npy`` file holds one array (samples, L+1, D). A ``.safetensors`` file holds one tensor of
that shape, and may say more: which text a sample is of, and an :class:`Origin`, the model and the
texts. Nothing in a header is believed before it fits the length of the file.

Files are read, not mapped. One thread fills a buffer while the core compares the other, so memory
is constant, and a file that shrinks is an error instead of a signal. A mapping was faster from the
page cache and several times slower from the disk.
"""

import ast
import json
import os
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .._core import parse_header
from ..errors import PositionsError, StatesError, why
from ..processes import processors
from ..values.identity import ModelIdentity, TextsIdentity
from ..values.plan import Rejection
from ..values.positions import Positions
from ..values.schema import fields_of, of_type
from .builder import Part

FORMAT = "shallower.states.1"
"""The key of a states file's metadata."""

HIDDEN_STATES = "hidden_states"
"""The name of the tensor of states."""

SAMPLES = "samples"
"""The name of the tensor that numbers the samples, (samples,) int64."""

SEQUENCES = "sequences"
"""The name of the tensor with the sequence of every sample, (samples,) int64."""

DTYPES: Mapping[str, Any] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
"""Dtypes of states in a safetensors file, and how the core takes them."""


BUFFER_BYTES = 4 << 20
"""Bytes that are read at a time, twice: one buffer is filled while the other is compared. States
that are still in the caches are compared faster."""

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
_NPY_DTYPES: Mapping[str, Any] = {
    "<u2": np.uint16,
    "<f2": np.float16,
    "<f4": np.float32,
    "<f8": np.float64,
}


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

        Raises one of ``NO_ORIGIN`` if it is damaged.
        """
        data = of_type(dict, json.loads(text))
        if not 0 <= of_type(int, data["num_rejected"]) < 2**31:
            raise ValueError(f"num_rejected is {data['num_rejected']}")
        return cls(**fields_of(cls, data))


NO_ORIGIN = (ValueError, TypeError, KeyError, RecursionError, PositionsError)
"""Raised where the metadata of a file holds no origin."""


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
        readers = {".npy": self._read_npy, ".safetensors": self._read_safetensors}
        if self.path.suffix not in readers:
            raise StatesError(
                f"cannot read states from {path}: expected a file that ends in .npy or .safetensors"
            )
        if tensor is not None and self.path.suffix == ".npy":
            raise StatesError(f"{path} holds one array without a name, not the tensor {tensor!r}")
        if not self.path.is_file():
            raise StatesError(f"there is no states file {path}")
        try:
            self._file: BinaryIO = self.path.open("rb", buffering=0)
        except OSError as error:
            raise StatesError(f"cannot read {path}: {why(error, path)}") from error
        try:
            self._stamp = self._stamp_now()
            self.shape, self.dtype, self._start = readers[self.path.suffix](tensor)
            self._check_shape()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "StatesFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return self.shape[0] * self._sample_bytes

    def parts(
        self, threads: int | None = None, sequences: NDArray[np.int64] | None = None
    ) -> Generator[Part, None, None]:
        """Read all samples in their order; one part is read while the last one is worked on.

        ``threads`` share a part, all by default; ``sequences`` are (samples,) int64. The next part
        but one overwrites the states of a part. StatesError: the file ended early, was changed, or
        cannot be read.
        """
        num_samples = self.shape[0]
        shared = SAMPLES_A_THREAD * (threads or processors()) * self._sample_bytes
        room = min(max(shared, BUFFER_BYTES), MAX_BUFFER_BYTES)
        step = min(max(1, room // self._sample_bytes), PART_SAMPLES, num_samples)
        try:
            buffers = [np.empty((step, *self.shape[1:]), self.dtype) for _ in range(2)]
        except MemoryError as error:
            raise StatesError(
                f"{self.path}: a sample of shape {self.shape[1:]} takes {self._sample_bytes} "
                f"bytes, more than there is memory for"
            ) from error
        self._prefetch(self._start, AHEAD_BYTES)
        with ThreadPoolExecutor(1, "states") as reader:
            reading = reader.submit(self._part, buffers[0], 0, sequences)
            for number, start in enumerate(range(0, num_samples, step)):
                part = reading.result()
                if start + step < num_samples:
                    buffer = buffers[(number + 1) % 2]
                    reading = reader.submit(self._part, buffer, start + step, sequences)
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
        return self._column(name, 0, len(self))

    @property
    def _sample_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * np.dtype(self.dtype).itemsize

    def _part(self, buffer: NDArray[Any], start: int, sequences: NDArray[np.int64] | None) -> Part:
        stop = min(start + len(buffer), self.shape[0])
        states = buffer[: stop - start]
        offset = self._start + start * self._sample_bytes
        self._prefetch(offset + AHEAD_BYTES, states.nbytes)
        self._fill(states, offset)
        return Part(
            states,
            self._column(SAMPLES, start, stop),
            steps=stop - start,
            sequences=None if sequences is None else sequences[start:stop],
        )

    def _column(self, name: str, start: int, stop: int) -> NDArray[np.int64]:
        """Some samples' entries of a tensor of integers, if there is one; else their places."""
        column = np.arange(start, stop)
        if name in self._columns:
            self._fill(column, self._columns[name] + start * 8)
        return column

    def _prefetch(self, offset: int, length: int) -> None:
        """Let the system fetch what is read soon, so that the disk does not wait for the core."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def _fill(self, array: NDArray[Any], offset: int) -> None:
        self._read_into(array.data.cast("B"), offset)

    def _read_into(self, room: memoryview, offset: int) -> None:
        end = offset + len(room)
        try:
            while room:
                self._file.seek(end - len(room))
                got = self._file.readinto(room)  # type: ignore[attr-defined]
                if not got:
                    break
                room = room[got:]
        except OSError as error:
            raise StatesError(f"cannot read {self.path}: {why(error, self.path)}") from error
        if room:
            raise StatesError(
                f"{self.path} ended early: expected {end} bytes at least, it holds "
                f"{self._stamp_now()[0]}"
            )

    def _read(self, offset: int, length: int) -> bytes:
        content = bytearray(length)
        self._read_into(memoryview(content), offset)
        return bytes(content)

    def _stamp_now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _check_shape(self) -> None:
        if 0 in self.shape:
            raise StatesError(f"{self.path} holds states of shape {self.shape}: there are none")
        model = self.origin.model
        if model and model.num_layers != self.shape[1] - 1:
            raise StatesError(
                f"{self.path} is damaged: it holds {self.shape[1]} states a sample, and its model "
                f"has {model.num_layers} layers"
            )

    def _read_npy(self, _: str | None) -> tuple[tuple[int, int, int], Any, int]:
        """NEP 1, https://numpy.org/neps/nep-0001-npy-format.html; only numbers are read."""
        size = self._stamp[0]
        beginning = self._read(0, min(size, 12 + _MAX_NPY_HEADER_BYTES))
        if beginning[:6] != b"\x93NUMPY" or len(beginning) < 12:
            raise StatesError(f"{self.path} is not a .npy file: it does not begin as one")
        version = tuple(beginning[6:8])
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise StatesError(f"{self.path} is of version {version} of .npy: expected 1, 2 or 3")
        start = 10 if version == (1, 0) else 12
        length = int.from_bytes(beginning[8:start], "little")
        if length > _MAX_NPY_HEADER_BYTES or start + length > size:
            raise StatesError(
                f"{self.path} is truncated or damaged: its header claims {length} bytes, the file "
                f"has {size}, and at most {_MAX_NPY_HEADER_BYTES} are read"
            )
        try:
            header = ast.literal_eval(beginning[start : start + length].decode("ascii").strip())
            descr, fortran_order = header["descr"], header["fortran_order"]
            shape, dtype = header["shape"], _NPY_DTYPES.get(str(descr))
            if set(header) != {"descr", "fortran_order", "shape"}:
                raise ValueError(f"it has the keys {sorted(header)}")
            if type(shape) is not tuple or any(type(axis) is not int or axis < 0 for axis in shape):
                raise ValueError(f"its shape is {shape!r}")
        except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
            raise StatesError(f"{self.path} has a broken header: {error}") from error
        if dtype is None:
            raise StatesError(
                f"{self.path} holds values of dtype {descr!r}: expected little-endian float32, "
                f"float16, float64, or bfloat16 as uint16 bits"
            )
        if fortran_order is not False:
            raise StatesError(
                f"{self.path} is in Fortran's order: save np.ascontiguousarray of the array"
            )
        self._check_axes(shape, "its array")
        start += length
        self._check_length(start + _product(shape) * np.dtype(dtype).itemsize, shape, descr)
        return shape, dtype, start

    def _read_safetensors(self, wanted: str | None) -> tuple[tuple[int, int, int], Any, int]:
        size = self._stamp[0]
        if size < 8:
            raise StatesError(f"{self.path} is not a safetensors file: it has {size} bytes")
        length = int.from_bytes(self._read(0, 8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise StatesError(
                f"{self.path} is truncated, or not a safetensors file: its header claims {length} "
                f"bytes, the file has {size}, and at most {_MAX_HEADER_BYTES} are read"
            )
        try:
            metadata, tensors = parse_header(self._read(8, length), size - 8 - length)
            if FORMAT in metadata:
                self.origin = Origin.from_json(metadata[FORMAT])
        except NO_ORIGIN as error:
            raise StatesError(f"{self.path} is truncated or damaged: {error}") from error
        name, dtype, shape, start, _ = self._choose(tensors, wanted)
        for column, column_dtype, column_shape, column_start, _ in tensors:
            if column in (SAMPLES, SEQUENCES) and column != name:
                if (column_dtype, column_shape) != ("I64", shape[:1]):
                    raise StatesError(
                        f"{self.path}: the tensor {column} is of dtype {column_dtype} and shape "
                        f"{column_shape}, expected I64 and {shape[:1]}"
                    )
                self._columns[column] = 8 + length + column_start
        return (shape[0], shape[1], shape[2]), DTYPES[dtype], 8 + length + start

    def _choose(self, tensors: list[Any], wanted: str | None) -> Any:
        """The tensor of states, with its dtype and axes checked."""
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
        name, dtype, shape, _, _ = chosen
        if dtype not in DTYPES:
            raise StatesError(
                f"{self.path}: the tensor {name} is of dtype {dtype}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        self._check_axes(shape, f"the tensor {name}")
        return chosen

    def _check_axes(self, shape: Any, name: str) -> None:
        if len(shape) != 3:
            raise StatesError(
                f"{self.path}: {name} has the shape {tuple(shape)}, expected three axes "
                f"(samples, L+1, D)"
            )

    def _check_length(self, expected: int, shape: Any, dtype: str) -> None:
        size = self._stamp[0]
        if size != expected:
            fault = "is truncated" if size < expected else "is longer than its header says"
            raise StatesError(
                f"{self.path} {fault}: an array of shape {shape} and dtype {dtype} makes "
                f"{expected} bytes, the file has {size}"
            )


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for axis in shape:
        product *= axis
    return product
