"""Shards as files of JSON, each with a checksum."""

import json
from pathlib import Path
from typing import ClassVar, Self

from ..errors import ScanError, ShallowerError, why
from ..values.hashing import hash_of
from ..values.schema import of_type, plain_fields, read

_DAMAGES = (ValueError, KeyError, TypeError, OverflowError, RecursionError, ShallowerError)


class JsonShard:
    """A dataclass whose fields are those of the file; ``FORMAT`` names them and their meaning."""

    FORMAT: ClassVar[str]

    @property
    def is_complete(self) -> bool:
        """True: it is written when all of it is measured."""
        return True

    def to_bytes(self) -> bytes:
        """Give its file."""
        content = {"format": self.FORMAT, **plain_fields(self)}
        return (json.dumps({**content, "sha256": hash_of(content)}) + "\n").encode()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a shard, and check it.

        ScanError: the file is not there, is truncated, damaged or of another version, or is no
        shard of this format.
        """
        try:
            found = of_type(dict, json.loads(Path(path).read_bytes()))
            if (given := of_type(str, found.pop("format"))) != cls.FORMAT:
                raise ValueError(f"got format {given!r}: make it anew")
            if found.pop("sha256") != hash_of({"format": given, **found}):
                raise ValueError("its checksum does not fit its content")
            shard: Self = read(cls, found)
        except OSError as error:
            raise ScanError(f"cannot read the shard {path}: {why(error, path)}") from error
        except _DAMAGES as error:
            raise ScanError(
                f"{path} is damaged, or no shard of format {cls.FORMAT}: {why(error)}"
            ) from error
        return shard
