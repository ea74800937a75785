"""Shards: equal parts of a work's batches, which any number of machines work on."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ..errors import ScanError
from .counts import counted

MOST_SHARDS = 100_000

SUFFIXES = {"scan": "safetensors", "eval": "json", "compare": "json", "curve": "json"}
"""The kinds of work that falls into shards, and how their files end."""

NAMES = {"scan": "scan", "eval": "eval", "compare": "comparison", "curve": "curve"}
"""What they are called."""

PLURAL = ("inputs", "measures", "settings", "texts", "versions", "weights")
"""What several shards have in common, of those that differ without an s."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One of ``count`` equal parts of a work, counted from 0; ScanError if there is none."""

    index: int
    count: int  # 1 to 100,000

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_SHARDS:
            raise ScanError(f"shard {self}: expected 1 to {MOST_SHARDS:,} shards")
        if not 0 <= self.index < self.count:
            raise ScanError(
                f"there is no shard {self}: shards are counted from 0, so that the last of "
                f"{self.count} is {self.count - 1}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> "Shard":
        """Read ``3/64``, or ``auto``: the place of this process among those of its job.

        ``auto`` is RANK of WORLD_SIZE, as torchrun sets them, or SLURM_ARRAY_TASK_ID of an array
        that begins at 0 and has no gaps.
        """
        if text == "auto":
            return cls._of_job(environment)
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if not match:
            raise ScanError(f"no shard {text!r}: expected I/N, as 3/64, or auto")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def _of_job(cls, environment: Mapping[str, str]) -> "Shard":
        for index, count in (
            ("RANK", "WORLD_SIZE"),
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
        ):
            found = environment.get(index, ""), environment.get(count, "")
            if all(one.isascii() and one.isdecimal() for one in found):
                return cls(int(found[0]), int(found[1]))
        raise ScanError(
            "shard auto: neither RANK and WORLD_SIZE nor SLURM_ARRAY_TASK_ID and "
            "SLURM_ARRAY_TASK_COUNT are set to numbers: name the shard, as 3/64"
        )

    def of(self, total: int) -> range:
        """The part of ``range(total)`` that it is; all parts together are the whole, in order."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def file_of(self, kind: str) -> str:
        """Name its file in the folder of a work of this kind."""
        return f"{kind}.{self.index}-of-{self.count}.{SUFFIXES[kind]}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class ShardOfScan:
    """A shard of a scan, and what it must have in common with the others."""

    shard: Shard
    num_batches: int  # of all texts
    num_done: int  # of the shard; fewer than all where it was interrupted
    batch_size: int  # texts in one forward
    versions: dict[str, str]
    job: str | None = None  # a hash of all that the scan depends on; None where that is not known

    def __post_init__(self) -> None:
        if not 0 <= self.num_done <= len(self.shard.of(self.num_batches)):
            raise ValueError(f"shard {self.shard}: {self.num_done} of its batches are done")

    @property
    def is_complete(self) -> bool:
        """Whether all of its batches are in it."""
        return self.num_done == len(self.shard.of(self.num_batches))

    @property
    def common(self) -> dict[str, object]:
        """What all shards of a scan have in common, by the words of an error."""
        return {
            "number of shards": self.shard.count,
            "number of batches": self.num_batches,
            "batch size": self.batch_size,
            "versions": self.versions,
        }


class ShardContent(Protocol):
    """A shard as it is read from its file."""

    @property
    def shard(self) -> Shard:
        """Which it is."""

    @property
    def job(self) -> str | None:
        """A hash of all that its work depends on; None where that is not known."""

    @property
    def is_complete(self) -> bool:
        """Whether all of its batches are in it."""

    @property
    def common(self) -> Mapping[str, object]:
        """What all shards have in common, by the words of an error."""

    def to_bytes(self) -> bytes:
        """Give its file."""


Content = TypeVar("Content", bound=ShardContent)


def kind_of(parts: Iterable[Path]) -> str:
    """The one kind of ``SUFFIXES`` that shards have, which are given or lie in folders."""
    found = {
        kind
        for part in parts
        for kind in SUFFIXES
        if (_inside(part, kind) if part.is_dir() else _kind_of_file(part) == kind)
    }
    if len(found) > 1:
        raise ScanError(
            f"these are shards of works of several kinds ({', '.join(sorted(found))}): gather them "
            f"one after the other"
        )
    return found.pop() if found else "scan"


def _kind_of_file(path: Path) -> str:
    """The kind of a shard's file, by its name; of another name by its suffix."""
    like_it = [kind for kind, suffix in SUFFIXES.items() if path.suffix == f".{suffix}"] or ["scan"]
    named = path.name.partition(".")[0]
    return named if named in like_it else like_it[0]


def shard_files(parts: Iterable[str | Path], kind: str = "scan") -> list[Path]:
    """The files of shards that are given, or lie in folders that are given; ScanError for none."""
    found = []
    for part in map(Path, parts):
        inside = _inside(part, kind) if part.is_dir() else [part]
        if not inside:
            expected = " or ".join(f"{name}.I-of-N.{suffix}" for name, suffix in SUFFIXES.items())
            raise ScanError(f"there are no shards in {part}: expected {expected}")
        found += inside
    if not found:
        raise ScanError("there are no shards to gather: name their files, or their folders")
    return found


def _inside(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}.*-of-*.{SUFFIXES[kind]}"))


def read_shards(
    parts: Iterable[str | Path], load: Callable[[Path], Content], kind: str
) -> list[Content]:
    """Read all shards of a work, in their order, from files or folders; twice counts once."""
    found: dict[Shard, tuple[Path, Content]] = {}
    for path in shard_files(parts, kind):
        one = load(path)
        if one.shard in found and one.to_bytes() != found[one.shard][1].to_bytes():
            first, _ = found[one.shard]
            raise ScanError(f"{first} and {path} are both shard {one.shard}, and differ")
        found.setdefault(one.shard, (path, one))
    in_order = [found[shard] for shard in sorted(found, key=lambda one: one.index)]
    for path, one in in_order[1:]:
        _check_alike(in_order[0], (path, one), kind)
    _check_complete([one for _, one in in_order])
    return [one for _, one in in_order]


def _check_alike(first: tuple[Path, Content], other: tuple[Path, Content], kind: str) -> None:
    """Refuse shards of different works, by what differs."""
    for name, mine in first[1].common.items():
        theirs = other[1].common[name]
        if mine != theirs:
            raise ScanError(
                f"{first[0]} and {other[0]} are shards of different {NAMES[kind]}s: their {name} "
                f"differ{'' if name in PLURAL else 's'} ({mine} and {theirs})"
            )


def _check_complete(shards: Sequence[ShardContent]) -> None:
    """Refuse a work of which shards are missing, or not done."""
    count = shards[0].shard.count
    done = {one.shard.index for one in shards if one.is_complete}
    missing = [str(Shard(index, count)) for index in range(count) if index not in done]
    if missing:
        named = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        are = "is" if len(missing) == 1 else "are"
        raise ScanError(f"{counted(len(missing), 'shard')} of {count} {are} missing: {named}")
