"""Parameters and bytes of a checkpoint, by the headers of its files alone."""

import math
from dataclasses import dataclass
from pathlib import Path

_PLAIN = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a value of each dtype whose values are parameters as they stand."""


@dataclass(frozen=True, slots=True)
class CheckpointSize:
    """The size of a checkpoint's files, and the number of its values, None if they are packed."""

    parameters: int | None
    num_bytes: int


def stored_bytes(place: Path) -> int | None:
    """Count the bytes of the weights at a place, a folder or a file; None if none are there."""
    try:
        if place.is_file():
            return place.stat().st_size
        sizes = [
            path.stat().st_size
            for pattern in ("*.safetensors", "pytorch_model*.bin")
            for path in place.glob(pattern)
        ]
    except OSError:
        return None
    return sum(sizes) or None


def count_weights(place: Path) -> CheckpointSize | None:
    """Count the weights of a folder or a GGUF file; None where there are none that can be read."""
    from safetensors import SafetensorError, safe_open

    if place.suffix == ".gguf":
        size = stored_bytes(place)
        return None if size is None else CheckpointSize(None, size)
    paths = sorted(place.glob("*.safetensors"))
    parameters, packed = 0, False
    try:
        for path in paths:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    tensor = file.get_slice(name)
                    packed |= tensor.get_dtype() not in _PLAIN
                    parameters += math.prod(tensor.get_shape())
        num_bytes = sum(path.stat().st_size for path in paths)
    except (OSError, SafetensorError):
        return None
    return CheckpointSize(None if packed else parameters, num_bytes) if paths else None
