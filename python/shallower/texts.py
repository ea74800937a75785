"""Texts from files and hub datasets, read one at a time."""

import json
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from .errors import MissingExtraError, TextsError

SUFFIXES = (".jsonl", ".txt", ".parquet")


class Texts:
    """An iterable of texts that can be opened again; ``len`` counts them where it is cheap.

    Args:
        source: a ``.jsonl`` file (field ``text``), a ``.txt`` file (a document a line, blank
            lines skipped), a ``.parquet`` file (column ``text``), or a hub dataset as
            ``id:split`` or ``id:config:split``, streamed (field ``text``).
        limit: read the first so many texts only.

    Raises:
        TextsError: the file is not there or of another kind; on iteration, a broken line.
        MissingExtraError: parquet or a hub dataset without the package datasets.
    """

    def __init__(self, source: str, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise TextsError(f"the number of texts must be at least 1, got {limit}")
        self.source = source
        self.limit = limit
        self._path = Path(source).expanduser()
        self._is_file = self._path.suffix in SUFFIXES
        if self._is_file and not self._path.is_file():
            raise TextsError(f"there is no text file {source}")
        if not self._is_file and (self._path.exists() or ":" not in source):
            raise TextsError(
                f"cannot read texts from {source}: expected a file ending in "
                f"{', '.join(SUFFIXES)}, or a hub dataset as id:split or id:config:split"
            )
        needs_datasets = not self._is_file or self._path.suffix == ".parquet"
        if needs_datasets and find_spec("datasets") is None:
            raise MissingExtraError("datasets", "texts", f"reading {source}")

    def __iter__(self) -> Iterator[str]:
        readers = {".jsonl": self._jsonl, ".txt": self._lines, ".parquet": self._parquet}
        read = readers[self._path.suffix] if self._is_file else self._hub
        return islice(read(), self.limit)

    def count(self) -> int | None:
        """How many texts there are, where counting does not load them; else the limit."""
        if self._is_file and self._path.suffix != ".parquet":
            with self._path.open("rb") as file:
                counted = sum(1 for line in file if line.strip())
            return counted if self.limit is None else min(counted, self.limit)
        return self.limit

    def _lines(self) -> Iterator[str]:
        for _, line in self._numbered_lines():
            yield line

    def _jsonl(self) -> Iterator[str]:
        for number, line in self._numbered_lines():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise TextsError(f"{self.source}, line {number}: not JSON ({error})") from error
            yield self._text(record, f"line {number}")

    def _numbered_lines(self) -> Iterator[tuple[int, str]]:
        number = 0
        try:
            with self._path.open(encoding="utf-8-sig", newline="\n") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise TextsError(f"{self.source}, after line {number}: not UTF-8 ({error})") from error
        except OSError as error:
            raise TextsError(f"cannot read {self.source}: {error}") from error

    def _parquet(self) -> Iterator[str]:
        from datasets import load_dataset

        yield from self._rows(
            lambda: load_dataset(
                "parquet", data_files=str(self._path), split="train", streaming=True
            )
        )

    def _hub(self) -> Iterator[str]:
        from datasets import load_dataset

        name, *config, split = self.source.split(":")
        yield from self._rows(lambda: load_dataset(name, *config, split=split, streaming=True))

    def _rows(self, load: Callable[[], Iterable[object]]) -> Iterator[str]:
        from datasets.exceptions import DatasetsError

        try:
            for number, record in enumerate(load()):
                yield self._text(record, f"row {number}")
        except (DatasetsError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise TextsError(f"cannot read {self.source}: {error}") from error

    def _text(self, record: object, place: str) -> str:
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise TextsError(f"{self.source}, {place}: no field `text` that holds a string")
        return text
