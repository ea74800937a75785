"""Texts from files and hub datasets, read one at a time."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from ..errors import MissingExtraError, TextsError, why
from ..progress import shortened
from .hub import hub_refusal
from .quiet import hushed

Item = TypeVar("Item")

SUFFIXES = (".jsonl", ".txt", ".parquet")
HUB_DATASET = re.compile(r"[\w./-]{1,200}(:[^:/]{1,200}){1,2}")

_MOST_NAMES = 200
"""Letters of the names of configs or splits in an error."""

_HEAD_BYTES = 1 << 16
"""The number of texts in a file is estimated from its size and as many bytes of its head."""


def place_of_texts(texts: object) -> str | None:
    """Name the file or the hub dataset that texts are read from; None where they are given."""
    return texts.source if isinstance(texts, Texts) else None


OWN_TOKENS = 128
"""Tokens of one of our own texts, at most."""


def own_texts() -> list[str]:
    """Read our own texts, each of another kind: most are unlike those that a patch fits."""
    return list(Texts(str(Path(__file__).with_name("out_of_domain.jsonl"))))


class Texts:
    """An iterable of texts that can be opened again, the first ``limit`` of a source.

    A source is a ``.jsonl`` file (field ``text``), a ``.txt`` file (a document a line, blank lines
    skipped), a ``.parquet`` file (column ``text``), or a hub dataset as ``id:split`` or
    ``id:config:split``, streamed (field ``text``). ``operator.length_hint`` estimates their number
    without reading them.
    """

    def __init__(self, source: str, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise TextsError(f"the number of texts must be at least 1, got {limit}")
        self.source = source
        self.limit = limit
        self._counted: int | None = None
        self._checked = False
        self._path, exists, is_file = looked_up(source, "texts")
        self._is_file = self._path.suffix in SUFFIXES
        if self._is_file and not is_file:
            if exists:
                raise TextsError(f"{source} is a folder: expected a text file")
            raise TextsError(f"there is no text file {source}")
        if not self._is_file and (exists or not HUB_DATASET.fullmatch(source)):
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
        count = 0
        for text in islice(read(), self.limit):
            count += 1
            yield text
        self._counted = count

    def __length_hint__(self) -> int:
        """An estimate of how many texts there are, for an ETA; 0 where nothing is known."""
        if self._counted is None and not self._is_file:
            return self.limit or 0
        if self._counted is None and self._path.suffix == ".parquet":
            self.count()
        known = self._estimate() if self._counted is None else self._counted
        return known if self.limit is None else min(known, self.limit)

    def check(self) -> "Texts":
        """Read the first text, once, so that a wrong source is found before long work; itself."""
        if not self._checked and not any(text.strip() for text in self):
            blank = f": all {self._counted} are blank" if self._counted else ""
            raise TextsError(f"there are no texts in {self.source}{blank}; name texts with words")
        self._checked = True
        return self

    def count(self) -> int | None:
        """Count the texts, where that does not load them; of a hub dataset the limit, or None."""
        if not self._is_file:
            return self.limit
        if self._counted is None:
            if self._path.suffix == ".parquet":
                self._counted = self._open_parquet().metadata.num_rows
            else:
                self._counted = sum(
                    1 for _ in islice(numbered_lines(self._path, self.source), self.limit)
                )
        return self._counted if self.limit is None else min(self._counted, self.limit)

    def _estimate(self) -> int:
        """About how many lines that are not blank a file has, by its size and its head."""
        try:
            size = self._path.stat().st_size
            with self._path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
        except OSError:
            return 0
        lines = sum(1 for line in head.split(b"\n") if line.strip())
        return lines if len(head) < _HEAD_BYTES else round(lines * size / _HEAD_BYTES)

    def _lines(self) -> Iterator[str]:
        for _, line in numbered_lines(self._path, self.source):
            yield line

    def _jsonl(self) -> Iterator[str]:
        for number, record in numbered_records(self._path, self.source):
            yield self._text(record, f"line {number}")

    def _open_parquet(self) -> Any:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(self._path)
        except (ArrowException, OSError) as error:
            raise TextsError(f"cannot read {self.source}: {why(error, self.source)}") from error

    def _parquet(self) -> Iterator[str]:
        from pyarrow import ArrowException

        file = self._open_parquet()
        if "text" not in file.schema_arrow.names:
            raise TextsError(f"{self.source}: no column `text`, only {file.schema_arrow.names}")
        number = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for record in batch.to_pylist():
                    yield self._text(record, f"row {number}")
                    number += 1
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise TextsError(
                f"cannot read {self.source}, row {number}: {why(error, self.source)}"
            ) from error

    def _hub(self) -> Iterator[str]:
        for number, record in enumerate(_hub_rows(self.source)):
            yield self._text(record, f"row {number}")

    def _text(self, record: object, place: str) -> str:
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise TextsError(f"{self.source}, {place}: no field `text` that holds a string")
        return text


def _hub_rows(source: str) -> Iterator[object]:
    """Stream a hub dataset; TextsError in one sentence, whatever the packages below raise."""
    from datasets import config as switches
    from datasets import load_dataset

    name, *config, split = source.split(":")
    asks = not switches.HF_HUB_OFFLINE and not Path(name).exists()
    if asks and (refusal := hub_refusal(name, "dataset")):
        raise TextsError(f"cannot read {source}: {refusal}, or name a file of texts")
    try:
        with hushed():
            rows = iter(load_dataset(name, *config, split=split, streaming=True))
            first = list(islice(rows, 1))  # here datasets also logs what is wrong with a file
        yield from chain(first, rows)
    except Exception as error:  # of datasets, or what reads the hub and files for it
        reason = _hub_reason(error, name, config, split=split)
        raise TextsError(f"cannot read {source}: {reason}") from error


_REASONS = {
    "Couldn't reach": "the hub is not asked (HF_HUB_OFFLINE), and the cache does not have it: "
    "unset that, or name a file of texts",
    "scripts are no longer supported": "it is a script, which is not run: name a dataset of files",
    "No (supported) data files": "it has no file that can be read: name another dataset",
    "contain any data files": "it has no file: name another dataset",
}
"""Our words by those of the package datasets."""


def _hub_reason(error: Exception, name: str, config: Sequence[str], *, split: str) -> str:
    """Why a dataset cannot be read: by our words where those of datasets have no way out."""
    text = str(error)
    if listed := re.search(r"\['(.*?)'\]", text, re.DOTALL):
        names = shortened(listed[1].replace("', '", ", "), _MOST_NAMES)
        if "split" in text[: listed.start()]:
            return f"it has no split {split}: expected one of {names}"
        if config:
            return f"it has no config {config[0]}: expected one of {names}"
        return f"name one of its configs, {names}: {name}:CONFIG:{split}"
    return next((ours for theirs, ours in _REASONS.items() if theirs in text), why(error))


def looked_up(source: str | Path, what: str) -> tuple[Path, bool, bool]:
    """Look for a file of ``what``: its place, whether anything is there, and whether a file is."""
    try:
        path = Path(source).expanduser()
        return path, path.exists(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise TextsError(f"cannot read {what} from {source}: {why(error, source)}") from error


def read_items(
    source: str | Path,
    what: str,
    *,
    fields: str,
    read: Callable[[object, int, str], Item],
    limit: int | None = None,
) -> list[Item]:
    """Read a file of ``what``, a JSON object a line with such fields; the first ``limit`` only.

    ``read`` takes an object, the number of its line, and both in words. TextsError for what is no
    file, or has no line.
    """
    path, exists, is_file = looked_up(source, what)
    if not is_file:
        found = f"{source} is a folder" if exists else f"there is no file of {what} {source}"
        raise TextsError(f"{found}: expected JSON lines with {fields}")
    records = islice(numbered_records(path, str(source)), limit)
    items = [read(record, number, f"{source}, line {number}") for number, record in records]
    if not items:
        raise TextsError(
            f"there are no {what} in {source}: expected a JSON object a line, with {fields}"
        )
    return items


def read_whole(path: str | Path) -> str:
    """Read a file of UTF-8 as one text, with all its white space.

    The documents of a ``.jsonl`` or ``.parquet`` file are joined by a blank line.
    """
    if Path(path).suffix in (".jsonl", ".parquet"):
        return "\n\n".join(Texts(str(path)).check())
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextsError(f"{path} is no text in UTF-8: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise TextsError(f"cannot read a text from {path}: {why(error, path)}") from error
    if not text.strip():
        raise TextsError(f"there is no text in {path}")
    return text


def numbered_lines(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Yield number, from 1 on, and text of every line that is not blank in the file ``source``."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise TextsError(f"{source}, line {number + 1} or later: not UTF-8 ({error})") from error
    except OSError as error:
        raise TextsError(f"cannot read {source}: {why(error, source)}") from error


def numbered_records(path: Path, source: str) -> Iterator[tuple[int, object]]:
    """Yield the number, from 1 on, and the value of every JSON line, as :func:`numbered_lines`."""
    for number, line in numbered_lines(path, source):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextsError(f"{source}, line {number}: not JSON ({error})") from error
        yield number, record
