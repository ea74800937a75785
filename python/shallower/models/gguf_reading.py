"""GGUF files parsed once for transformers, with long rows; the results are the same to the bit.

Transformers parses a file three times and copies every string of its vocabulary. It remakes the
table of tensor names for every module, and dequantises 16 rows at a time.
"""

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .architecture import swapped

ROW_BYTES = 1 << 13
"""Rows are dequantised together until they have as many bytes."""

_LOCK = RLock()
"""Names of the package gguf are replaced by one thread at a time."""


@contextmanager
def faster_gguf() -> Iterator[None]:
    """Read GGUF files faster in the body, without a bar; they must not change meanwhile."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    with (
        _LOCK,
        swapped(
            gguf,
            GGUFReader=cache(_reader_class()),
            get_tensor_name_map=cache(gguf.get_tensor_name_map),
            dequantize=_by_long_rows(gguf.dequantize),
        ),
        swapped(loader, tqdm=lambda tensors, **_: tensors),
    ):
        yield


def layer_bytes(file: Path, num_layers: int) -> int:
    """Count the stored bytes of all layers in a GGUF file, without those for more tokens."""
    found = [(tensor.name.split("."), tensor.n_bytes) for tensor in _reader_class()(file).tensors]
    return sum(int(n) for name, n in found if name[0] == "blk" and int(name[1]) < num_layers)


def dequantising(file: Path) -> tuple[Callable[[], Any], int]:
    """Give what dequantises the largest tensor of a layer in a GGUF file, and its values."""
    import gguf

    layers = [one for one in _reader_class()(file).tensors if one.name.startswith("blk.")]
    largest = max(layers, key=lambda one: int(one.n_elements))
    make = _by_long_rows(gguf.dequantize)
    return lambda: make(largest.data, largest.tensor_type), int(largest.n_elements)


def _by_long_rows(dequantize: Callable[..., Any]) -> Callable[..., Any]:
    """Dequantise several rows as one; every block of a row is dequantised by itself."""

    def faster(data: NDArray[Any], kind: Any) -> Any:
        rows, together = math.prod(data.shape[:-1]), 1
        while rows % (2 * together) == 0 and data.shape[-1] * together < ROW_BYTES:
            together *= 2
        if together == 1:
            return dequantize(data, kind)
        whole = dequantize(data.reshape(rows // together, -1), kind)
        return whole.reshape(*data.shape[:-1], -1)

    return faster


@cache
def _reader_class() -> Any:
    from gguf import GGUFReader, GGUFValueType

    class QuickReader(GGUFReader):
        """A reader that makes no array for every string of an array of strings."""

        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            # Slices of a memmap cost tenfold those of the array that it is.
            array: Any = np.asarray(mapped)
            self._bytes, self._view = array, memoryview(array)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY and self.byte_order == "I":
                kind, count = struct.unpack_from("=IQ", self._view, orig_offs)
                head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
                items: Any = None
                if kind == GGUFValueType.STRING:
                    items, size = _strings(self._view, orig_offs + 12, count)
                elif kind in self.gguf_scalar_to_np:
                    values = self._get(orig_offs + 12, self.gguf_scalar_to_np[kind], count)
                    items, size = values.reshape(-1, 1), values.nbytes
                if items is not None:
                    if len(items) != count:
                        raise ValueError(f"an array of {count} items ends after {len(items)}")
                    types = [GGUFValueType.ARRAY, *[GGUFValueType(kind)] * (count > 0)]
                    places = list(range(len(head), len(head) + count))
                    return 12 + size, [*head, *items], places, types
            return super()._get_field_parts(orig_offs, raw_type)

    return QuickReader


def _strings(view: memoryview, start: int, count: int) -> tuple[list[memoryview], int]:
    """So many strings, as views of their bytes, and the bytes that they take with their lengths."""
    found, offset = [], start
    length = struct.Struct("=Q").unpack_from
    for _ in range(count):
        first = offset + 8
        offset = first + length(view, offset)[0]
        found.append(view[first:offset])
    if offset > len(view):
        raise ValueError(f"an array of {count} strings ends behind the file")
    return found, offset - start
