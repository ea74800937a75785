"""Shards: equal parts of a work's batches, which any number of machines work on."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ScanError

MOST_SHARDS = 100_000

NAMES = {"scan": "scan", "eval": "eval", "compare": "comparison", "curve": "curve"}
"""The kinds of work that falls into shards, and what they are called."""


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
        return f"{kind}.{self.index}-of-{self.count}.json"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
