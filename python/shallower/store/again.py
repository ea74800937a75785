"""Make a result again from its record, and compare: file by file, and figure by figure."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..cutting.exports import MERGEKIT_FILE
from ..cutting.source import CARD_FILE
from ..errors import OutputError
from ..models.dtypes import QUANTISED
from ..values.counts import counted
from ..values.files import PATCH_FILE, PLAN_FILE
from ..values.hashing import hash_of
from ..values.provenance import versions
from .records import (
    MODELS,
    Read,
    Record,
    changed,
    fetch_small,
    files_of,
    files_on_hub,
    here,
    read_of,
)
from .store import FOLDER_VARIABLE, Store, store_folder

NATS = 0.02
"""How far losses may lie apart that other instructions or threads have made."""

_COMPUTED = (".safetensors", ".gguf", PATCH_FILE, PLAN_FILE)
"""Ends of the names of files that hold what other instructions or threads compute otherwise."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What can be promised of a result that is made again here.

    Attributes:
        bytes: whether its files are the same, to the byte; else its losses are within ``NATS``, if
            it has any.
        why: in words.
        versions: packages that are of other versions here, which plans and cards name.
    """

    bytes: bool
    why: str
    versions: tuple[str, ...] = ()


def promise_of(record: Record) -> Promise:
    """Say what can be promised here, on this processor, with these instructions and threads."""
    found = versions()
    other = tuple(name for name, one in record.versions.items() if found.get(name) != one)
    if record.command == "prune" and record.settings.get("dtype") not in ("auto", *QUANTISED):
        what = "plan and card" if _is_copied(record) else "configs, plan and card"
        told = f"; its {what} name other versions of {', '.join(other)}" if other else ""
        return Promise(True, f"the same bytes: a cut copies them, on any machine{told}", other)
    mine = here()
    apart = [
        name
        for name in ("cpu", "gpus", "variables", "tier", "threads", "processes")
        if mine.get(name) != record.machine.get(name)
    ]
    if not apart and not other:
        return Promise(True, "the same bytes: processor, instructions and threads are those of it")
    names = {"cpu": "processor", "gpus": "cards", "variables": "instructions"}
    words = ", ".join([*(names.get(one, one) for one in apart), *other])
    what = "nothing for sure, so all bytes are compared"
    if record.figures:
        what = f"the same losses within {NATS} nats a token"
    return Promise(False, f"{what}: not with the same {words}", other)


def _is_copied(record: Record) -> bool:
    """Whether a result is a cut that copies bytes, as far as its record shows.

    All else is saved by transformers, with configs of its version.
    """
    model = record.read.get("model")
    from_gguf = model is not None and [*model.files] == [""]
    to_gguf = record.out.endswith(".gguf") or "as_gguf" in record.settings
    is_stored = record.command == "prune" and "dtype" not in record.settings
    return is_stored and from_gguf == to_gguf


def changed_result(record: Record, place: Path | str, store: Store) -> list[str]:
    """Say which files of a result are not as its record has them, a line each.

    ModelError where one on the hub cannot be fetched.
    """
    if isinstance(place, str):
        found = files_on_hub(place, record.command, record.part, store=store)
    else:
        found = files_of(place, record.command, record.part, store=store)
    return [f"result: {line}" for line in changed(record.files, found)]


def find_reads(
    record: Record, given: Mapping[str, str | None], store: Store
) -> tuple[dict[str, str], list[str]]:
    """Find all that a record has read, and say what of it has changed, a line each.

    ``given`` are places by option; what is of the hub is read from there. OutputError names what is
    not at hand, by its hash, and what the record does not read.
    """
    places, lines = {}, []
    for name in given:
        if given[name] and name not in record.read:
            option = f"--{name.replace('_', '-')}"
            raise OutputError(f"by its record {record.out} was made without {option}: leave it out")
    for name, read in record.read.items():
        place = given.get(name) or (None if read.commit is None else read.name)
        if place is None:
            raise OutputError(_wanted(name, read))
        if not given.get(name) and Path(place).exists():
            raise OutputError(
                f"the record reads {place} from the hub, and it is also here: say which, by a path "
                f"or from another folder (--{name.replace('_', '-')})"
            )
        places[name] = place
        if read.commit and place == read.name and name in MODELS:
            fetch_small(read)
        found = read_of(name, place, record.command, given=record.settings, store=store)
        lines += read.differences(found, f"--{name.replace('_', '-')} {place}")
    return places, lines


def _wanted(name: str, read: Read) -> str:
    option = f"--{name.replace('_', '-')}"
    sums = list(read.files.values())
    count = "" if read.count is None else f", {read.count:,} texts"
    return (
        f"the record does not say where {read.name} lies{count}, of SHA-256 {sums[0][:16]}"
        f"{f' and {len(sums) - 1} more files' if len(sums) > 1 else ''}: name it ({option})"
    )


@contextmanager
def working_folder(record: Record) -> Iterator[Path]:
    """Give a folder to make a result in, which stays: the next call goes on.

    The cache of measurements lies in it, so that nothing that is known already is taken.
    """
    home = store_folder()
    if home is None:
        raise OutputError(f"there is no home to work in: name a folder ({FOLDER_VARIABLE})")
    folder = home / "reproduce" / hash_of(record.to_json())[:16]
    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(folder / "cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    finally:
        if before is None:
            del os.environ[FOLDER_VARIABLE]
        else:
            os.environ[FOLDER_VARIABLE] = before


def compare(record: Record, made: Record, promise: Promise) -> list[str]:
    """Say in what a result that was made again differs from its record, a line each.

    A card is in the words of the version that wrote it; a plan names versions, and a config that
    transformers saved. Some files name the source, which may be a copy by another name here.
    """
    worded = [CARD_FILE]
    if promise.versions:
        worded.append(PLAN_FILE if _is_copied(record) else ".json")
    if any(read.name != made.read[name].name for name, read in record.read.items()):
        worded += [PLAN_FILE, MERGEKIT_FILE, "tokenizer_config.json"]
    worded += _COMPUTED if record.figures and not promise.bytes else []
    passed = tuple(f"{name} has other bytes" for name in worded)
    found = changed(record.files, made.of_part(record.part).files)
    lines = [f"made again: {line}" for line in found if not line.endswith(passed)]
    for name in sorted({*record.figures, *made.figures}):
        had, has = record.figures.get(name), made.figures.get(name)
        if had is None or has is None:
            lines.append(f"{name}: {has} nats, expected {had}")
        elif abs(had - has) > (0.0 if promise.bytes else NATS):
            lines.append(f"{name}: {has:.4f} nats, expected {had:.4f}")
    for name in promise.versions if lines and (promise.bytes or not record.figures) else ():
        version = record.versions[name]
        lines.append(f"{name} {version} has made it, here is {made.versions.get(name)}")
    return lines


def agreement(record: Record, made: Record, promise: Promise) -> str:
    """Say how far a result that was made again is that of its record, where nothing differs."""
    same = {*record.files.items()} & {*made.of_part(record.part).files.items()}
    files, figures = counted(len(record.files), "file"), counted(len(record.figures), "figure")
    files = files if len(same) == len(record.files) else f"{len(same)} of {files}"
    if not record.figures:
        return f"the same: {files}"
    return f"the same: {files}; {figures}{'' if promise.bytes else f' within {NATS} nats'}"
