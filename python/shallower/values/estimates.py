"""What a dry run says of a study: its texts, disk and time, and what cannot be estimated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .memory import format_size

SETS = {"fit": "calibration", "choose": "selection", "report": "test"}
"""The three sets of texts by their names in files, in words."""


def splits_words(splits: Mapping[str, int]) -> str:
    """Say how many texts each set has: ``64 calibration, 16 selection, 64 test``."""
    return ", ".join(f"{number:,} {SETS[name]}" for name, number in splits.items()) or "not known"


@dataclass(frozen=True, slots=True)
class Unknown:
    """Why something cannot be estimated."""

    why: str

    def to_json(self) -> dict[str, str]:
        """Give the sentence."""
        return {"unknown": self.why}

    def __str__(self) -> str:
        return f"cannot be estimated beforehand: {self.why}"


@dataclass(frozen=True, slots=True)
class Divided:
    """The number of calibration, selection and test texts, by the name of the calibration texts."""

    counts: dict[str, tuple[int, int, int]]

    def to_json(self) -> dict[str, dict[str, int]]:
        """Give the counts by name."""
        return {name: dict(zip(SETS, of, strict=True)) for name, of in self.counts.items()}

    def __str__(self) -> str:
        several = len(self.counts) > 1
        return "; ".join(
            (f"{name}: " if several else "") + splits_words(of)
            for name, of in self.to_json().items()
        )


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes that a command writes to a place, at most, and those that are free there."""

    bytes: int
    free_bytes: int

    def to_json(self) -> dict[str, int]:
        """Give both numbers."""
        return {"bytes": self.bytes, "free_bytes": self.free_bytes}

    def __str__(self) -> str:
        size = f"at most {format_size(self.bytes)}" if self.bytes >= 10**7 else "a few MB"
        return f"{size} of {format_size(self.free_bytes)} that are free"


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
