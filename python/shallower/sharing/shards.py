"""Shards of a work as files of JSON with a checksum: read, and held against one another."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ScanError, ShallowerError, why
from ..values.counts import counted
from ..values.provenance import hash_of
from ..values.schema import of_type, plain_fields, read
from ..values.shard import NAMES, Shard

FORMAT = "shallower.shard.3"

PLURAL = ("inputs", "measures", "settings", "texts", "versions", "weights")
"""What shards have in common, of those that differ without an s."""

DAMAGES = (ValueError, KeyError, TypeError, OverflowError, RecursionError, ShallowerError)
"""What a value raises that is not what it should be."""


@dataclass(frozen=True, slots=True)
class MadeShard:
    """A shard of a work."""

    kind: str  # the work's, of ``NAMES``
    shard: Shard
    job: str | None  # a hash of all that the work depends on; None where that is not known
    versions: Mapping[str, str]
    common: Mapping[str, Any]  # to all shards of the work, by the words of an error
    described: Mapping[str, Any]  # the work, from which a process makes it again
    values: Mapping[str, Any]  # what was found, by unit
    entries: Mapping[str, Any]  # of the store that the units measured into
    failed: Mapping[str, str]  # why units of several models could not be done, by unit

    def __post_init__(self) -> None:
        if self.kind not in NAMES:
            raise ValueError(f"it is of {self.kind!r}")

    @property
    def compared(self) -> dict[str, Any]:
        """What is held against other shards, by the words of an error."""
        of = {"number of shards": self.shard.count, "versions": self.versions}
        return {**of, **self.common, "inputs": self.job}

    def to_bytes(self) -> bytes:
        """Give its file."""
        content = {"format": FORMAT, **plain_fields(self)}
        return (json.dumps({**content, "sha256": hash_of(content)}) + "\n").encode()

    @classmethod
    def load(cls, path: str | Path) -> "MadeShard":
        """Read a shard from its file, and check it."""
        try:
            found = of_type(dict, json.loads(Path(path).read_bytes()))
            if (given := of_type(str, found.pop("format"))) != FORMAT:
                raise ValueError(f"got format {given!r}: make it anew")
            if found.pop("sha256") != hash_of({"format": given, **found}):
                raise ValueError("its checksum does not fit its content")
            shard: MadeShard = read(cls, found)
        except OSError as error:
            raise ScanError(f"cannot read the shard {path}: {why(error, path)}") from error
        except DAMAGES as error:
            raise ScanError(
                f"{path} is damaged, or no shard of format {FORMAT}: {why(error)}"
            ) from error
        return shard


def values_of(shards: Sequence[MadeShard], kind: Any) -> list[Any]:
    """Read the value of each shard, which is a unit, as a ``kind``."""
    found = []
    for one in shards:
        try:
            found.append(read(kind, one.values[str(one.shard)]))
        except DAMAGES as error:
            raise ScanError(f"shard {one.shard} is damaged: {why(error)}") from error
    return found


def read_shards(parts: Iterable[str | Path]) -> list[MadeShard]:
    """Read all shards of a work, in their order, from files or folders; twice counts once."""
    found: dict[Shard, tuple[Path, MadeShard]] = {}
    loaded = [(path, MadeShard.load(path)) for path in _files(parts)]
    kinds = sorted({one.kind for _, one in loaded})
    if len(kinds) > 1:
        raise ScanError(
            f"these are shards of works of several kinds ({', '.join(kinds)}): gather them one "
            f"after the other"
        )
    for path, one in loaded:
        first, same = found.setdefault(one.shard, (path, one))
        if same.to_bytes() != one.to_bytes():
            raise ScanError(f"{first} and {path} are both shard {one.shard}, and differ")
    in_order = [found[shard] for shard in sorted(found, key=lambda one: one.index)]
    for other in in_order[1:]:
        _check_alike(in_order[0], other)
    _check_complete([one.shard for _, one in in_order])
    return [one for _, one in in_order]


def _files(parts: Iterable[str | Path]) -> list[Path]:
    found = []
    for part in map(Path, parts):
        inside = sorted(part.glob("*.*-of-*.json")) if part.is_dir() else [part]
        if not inside:
            expected = " or ".join(f"{kind}.I-of-N.json" for kind in NAMES)
            raise ScanError(f"there are no shards in {part}: expected {expected}")
        found += inside
    if not found:
        raise ScanError("there are no shards to gather: name their files, or their folders")
    return found


def _check_alike(first: tuple[Path, MadeShard], other: tuple[Path, MadeShard]) -> None:
    """Refuse shards of different works, by what differs."""
    theirs = other[1].compared
    for name, mine in first[1].compared.items():
        if mine != theirs.get(name):
            raise ScanError(
                f"{first[0]} and {other[0]} are shards of different {NAMES[first[1].kind]}s: "
                f"their {name} differ{'' if name in PLURAL else 's'} "
                f"({mine} and {theirs.get(name)})"
            )


def _check_complete(shards: Sequence[Shard]) -> None:
    """Refuse a work of which shards are missing."""
    count, there = shards[0].count, {one.index for one in shards}
    missing = [str(Shard(index, count)) for index in range(count) if index not in there]
    if missing:
        named = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        are = "is" if len(missing) == 1 else "are"
        raise ScanError(f"{counted(len(missing), 'shard')} of {count} {are} missing: {named}")
