"""What a dry run says: texts, memory, disk and time, and what cannot be estimated."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from ..errors import ModelError, ShallowerError
from .schema import plain_fields

SETS = {"fit": "calibration", "choose": "selection", "report": "test"}
"""The three sets of texts by their names in files, in words."""


def splits_words(splits: Mapping[str, int]) -> str:
    """Say how many texts each set has: ``64 calibration, 16 selection, 64 test``."""
    return ", ".join(f"{number:,} {SETS[name]}" for name, number in splits.items()) or "not known"


@dataclass(frozen=True, slots=True)
class Said:
    """A value of a dry run, in words and as JSON."""

    words: str
    json: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return dict(self.json)

    def __str__(self) -> str:
        return self.words


def unknown(why: str) -> Said:
    """Say why something cannot be estimated."""
    return Said(f"cannot be estimated beforehand: {why}", {"unknown": why})


def divided(counts: Mapping[str, Sequence[int]]) -> Said:
    """Say how many texts each set has, by the name of the calibration texts."""
    sets = {name: dict(zip(SETS, of, strict=True)) for name, of in counts.items()}
    words = (f"{name}: " * (len(sets) > 1) + splits_words(of) for name, of in sets.items())
    return Said("; ".join(words), sets)


def disk(most: int, free: int) -> Said:
    """Say how many bytes a command writes to a place, at most, and how many are free there."""
    size = f"at most {format_size(most)}" if most >= 10**7 else "a few MB"
    numbers = {"bytes": most, "free_bytes": free}
    return Said(f"{size} of {format_size(free)} that are free", numbers)


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds that work takes on this machine alone, about or ``at_least``."""

    seconds: float
    beside: str = ""  # what is not in them
    at_least: bool = False
    load: float = 0.0
    slower: float = 1.0  # times as long beside the present `load`

    def to_json(self) -> dict[str, Any]:
        """Give the seconds alone and under the present load, and what is not in them."""
        seconds, loaded = round(self.seconds, 3), round(self.seconds * self.slower, 3)
        found = {"seconds": seconds, "at_least": self.at_least, "load": round(self.load, 2)}
        beside = {"beside": self.beside} if self.beside else {}
        return {**found, "seconds_under_load": loaded, **beside}

    def __str__(self) -> str:
        beside = f", beside {self.beside}" if self.beside else ""
        about, loaded = "at least" if self.at_least else "about", self.seconds * self.slower
        busy = f"; load {self.load:.0f}: {about} {_rounded(loaded)}" if self.slower > 1.2 else ""
        return f"{about} {_rounded(self.seconds)} alone{busy}{beside}"


def _rounded(seconds: float) -> str:
    """A time in two digits at most, of the largest unit that it has one of."""
    units = (("s", 90.0), ("min", 90 * 60.0), ("hours", 48 * 3600.0), ("days", float("inf")))
    sizes = {"s": 1.0, "min": 60.0, "hours": 3600.0, "days": 86400.0}
    unit = next(name for name, most in units if seconds < most)
    count = max(1.0, seconds / sizes[unit])
    return f"{round(count / 10) * 10 if count >= 30 else round(count)} {unit}"


RESERVED_SHARE = 0.05
"""Share of a device that is left free: blocks that the allocator cannot use."""

RESERVED_BYTES = 1 << 29
"""Left free beside it: the context of a GPU, its kernels and the libraries' workspaces."""

EXPERTS = "routed experts"
"""The part of a plan that is the weights of routed experts, which nf4 and int8 leave plain."""

WEIGHTS, OFFLOADED = "weights on the device", "weights offloaded"
"""Parts of a plan that divides the weights; the second lies elsewhere, and not in the peak."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(size: int | str, error: type[ShallowerError] = ModelError) -> int:
    """Read a number of bytes: ``16GB`` or ``80G`` (10^9 each), ``16GiB`` (2^30 each), or plain."""
    match = None if isinstance(size, bool) else _SIZE.fullmatch(str(size).strip())
    unit, binary = (match[2].lower(), bool(match[3])) if match else ("", False)
    if match and (unit or not binary):
        count = int(Decimal(match[1]) * (_BINARY_UNITS if binary else _UNITS)[unit])
        if 1 <= count < 2**63:
            return count
    raise error(f"unknown size {size!r}: expected bytes, as 16GB, 80G or 16GiB")


def format_size(size: int) -> str:
    """Write a number of bytes for people, in GB of 10^9 bytes, or in MB below a tenth of one."""
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"


def usable(device_bytes: int) -> int:
    """Count the bytes of a device that a plan may take: those that are free, less the reserve."""
    return max(0, int(device_bytes * (1 - RESERVED_SHARE)) - RESERVED_BYTES)


def needed_device(peak_bytes: int) -> int:
    """Count the bytes of a device that has room for a peak, the reverse of :func:`usable`."""
    return math.ceil((peak_bytes + RESERVED_BYTES + 1) / (1 - RESERVED_SHARE))


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a step needs of a device, and what was chosen so that it fits.

    Attributes:
        peak_bytes: bytes that are held at once at the peak, weights included; None where the
            family of the model cannot be rehearsed, so that nothing is known.
        micro_batch: texts in one forward.
        gradient_checkpointing: whether activations are recomputed in the backward pass; None
            where there is none.
        device_bytes: memory of the device that is free, or all of a card that is not here.
        parts: bytes at the peak by what they are for.
    """

    peak_bytes: int | None
    micro_batch: int
    gradient_checkpointing: bool | None
    device_bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    @property
    def fits(self) -> bool:
        """Whether the device has room, a reserve aside; True where the need is unknown."""
        return self.peak_bytes is None or self.peak_bytes <= usable(self.device_bytes)

    def to_json(self) -> dict[str, Any]:
        """Give the attributes as plain JSON values."""
        return plain_fields(self)

    def __str__(self) -> str:
        texts = "1 text" if self.micro_batch == 1 else f"{self.micro_batch} texts"
        choice = f"{texts} a forward"
        if self.gradient_checkpointing is not None:
            choice += f", {'with' if self.gradient_checkpointing else 'without'} recomputation"
        device = format_size(self.device_bytes)
        if self.peak_bytes is None:
            return f"unknown for a model of this family, of {device}; {choice}"
        held = {name: size for name, size in self.parts.items() if size}
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in held.items())
        fits = "" if self.fits else ", which does not fit"
        return f"{format_size(self.peak_bytes)} of {device}{fits} ({parts}); {choice}"
