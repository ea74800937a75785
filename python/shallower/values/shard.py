"""Shards: equal parts of a scan's batches, which any number of machines work on."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ScanError

MOST_SHARDS = 100_000


@dataclass(frozen=True, slots=True)
class Shard:
    """One of ``count`` equal parts of a work, counted from 0.

    Attributes:
        index: its number, 0 to ``count`` - 1.
        count: parts in all, 1 to 100,000.

    Raises:
        ScanError: there is no such part.
    """

    index: int
    count: int

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
        that begins at 0 and has no gaps. ScanError: it is neither, or out of range.
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

    @property
    def file(self) -> str:
        """The name of its file in the folder of a scan."""
        return f"scan.{self.index}-of-{self.count}.safetensors"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class ShardOfScan:
    """A shard of a scan, and what it must have in common with the others.

    Attributes:
        shard: which of them it is.
        num_batches: batches of all texts.
        num_done: batches of the shard that are in it; fewer than all where it was interrupted.
        batch_size: texts in one forward.
        versions: of the packages that made it.
        job: a hash of all that the scan depends on; None where that is not known.
    """

    shard: Shard
    num_batches: int
    num_done: int
    batch_size: int
    versions: dict[str, str]
    job: str | None = None

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
