"""Make a result again from its record, and compare: file by file, and figure by figure."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from math import isclose
from pathlib import Path

from ..cutting.source import CARD_FILE
from ..errors import OutputError, raise_output_error
from ..models.dtypes import QUANTISED
from ..processes import held, is_held
from ..storage import RESULT_RECORD, sha256_of
from ..values.counts import counted
from ..values.files import OF_ONE_MODEL, SCAN_FILE
from ..values.hashing import hash_of
from ..values.provenance import versions
from .records import (
    MODELS,
    OTHER,
    Read,
    Record,
    changed,
    fetch_small,
    figures_of,
    file_in,
    here,
    option_of,
    parts_of,
    read_of,
    result_of,
    text_of,
)
from .store import FOLDER_VARIABLE, Store, store_folder

NATS = 0.02
"""How far losses may lie apart that other instructions or threads have made."""

_WEIGHTS = (".safetensors", ".gguf")
_COMPUTED = (*_WEIGHTS, CARD_FILE, *OF_ONE_MODEL)
"""Ends of the names of files that hold what other instructions or threads compute otherwise."""

_MOST_AT_ONCE = 256
"""How many processes make one result again at once."""

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")

Losses = Callable[[str], tuple[float, float] | None]
"""The losses of the weights in a file, as published and as made again; None if not measured."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What can be promised of a result that is made again here.

    Attributes:
        bytes: whether its files are the same, to the byte; else its losses are within ``NATS``, if
            it has any.
        why: in words.
        versions: packages that are of other versions here, which files name.
    """

    bytes: bool
    why: str
    versions: tuple[str, ...] = ()


def promise_of(record: Record) -> Promise:
    """Say what can be promised here, on this processor, with these instructions and threads."""
    found = versions()
    other = tuple(name for name, one in record.versions.items() if found.get(name) != one)
    if record.command == "prune" and record.settings.get("dtype") not in ("auto", *QUANTISED):
        told = f"; its files name other versions of {', '.join(other)}" if other else ""
        made = f"a cut {_how_made(record)} them, on any machine"
        return Promise(True, f"the same bytes: {made}{told}", other)
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


def _how_made(record: Record) -> str:
    """What a cut does with weights, as far as its record shows."""
    model = record.read.get("model")
    from_gguf = model is not None and [*model.files] == [""]
    if from_gguf and not (record.out.endswith(".gguf") or "as_gguf" in record.settings):
        return "dequantises"
    return "converts" if "dtype" in record.settings else "copies"


@dataclass(frozen=True, slots=True)
class Compared:
    """A result as it is compared, item by item: what is in neither field is the same.

    Attributes:
        differs: what differs, a line each.
        unsure: the files that could not be compared, and why.
    """

    differs: list[str] = field(default_factory=list)
    unsure: dict[str, str] = field(default_factory=dict)


def compare_result(record: Record, place: Path | str, store: Store) -> tuple[Path, Compared]:
    """Compare a result with its record; gives also its folder, or GGUF file.

    ModelError where one on the hub cannot be fetched.
    """
    folder, files = result_of(place, store)
    expected, done = dict(record.files), Compared()
    for part in parts_of(record):
        name = f"{part}/{RESULT_RECORD}"
        expected[name] = hashlib.sha256(record.of_part(part).content).hexdigest()
        files |= {name: sha256_of(folder / name)} if (folder / name).is_file() else {}
    for name, how in changed(expected, files).items():
        text = text_of(record, file_in(folder, name)) if name.endswith(CARD_FILE) else ""
        if how == OTHER and text and hash_of(text) == record.said.get(name):
            done.unsure[name] = "its results are not those of the record"
        else:
            done.differs.append(f"result: {name} {how}")
    try:
        figures = record.figures if record.part else figures_of(folder, record.command)
    except (ValueError, KeyError, TypeError, AttributeError):
        figures = {}
    others = _other_figures(record.figures, figures, 0.0)
    done.differs.extend(f"result: {line}" for line in others)
    return folder, done


def _other_figures(
    expected: Mapping[str, float], found: Mapping[str, float], most: float
) -> Iterator[str]:
    """Name the figures that differ by more than ``most``, a line each."""
    for name in sorted({*expected, *found}):
        had, has = expected.get(name), found.get(name)
        if had is None or has is None:
            yield f"{name}: {has} nats, expected {had}"
        elif not abs(had - has) <= most:
            yield f"{name}: {has:.4f} nats, expected {had:.4f}"


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
            raise OutputError(
                f"by its record {record.out} was made without {option_of(name)}: leave it out"
            )
    for name, read in record.read.items():
        place = given.get(name) or (None if read.commit is None else read.name)
        if place is None:
            raise OutputError(_wanted(name, read))
        if not given.get(name) and Path(place).exists():
            raise OutputError(
                f"the record reads {place} from the hub, and it is also here: say which, by a path "
                f"or from another folder ({option_of(name)})"
            )
        places[name] = place
        if read.commit and place == read.name and name in MODELS:
            fetch_small(read)
        found = read_of(name, place, record.command, given=record.settings, store=store)
        lines += read.differences(found, f"{option_of(name)} {place}")
    return places, lines


def _wanted(name: str, read: Read) -> str:
    sums = list(read.files.values())
    count = "" if read.count is None else f", {read.count:,} texts"
    return (
        f"the record does not say where {read.name} lies{count}, of SHA-256 {sums[0][:16]}"
        f"{f' and {len(sums) - 1} more files' if len(sums) > 1 else ''}: name it "
        f"({option_of(name)})"
    )


@contextmanager
def working_folder(record: Record) -> Iterator[Path]:
    """Give a folder to make a result in, which stays: the next call goes on.

    The cache of measurements lies in it, so that nothing that is known already is taken.
    """
    home = store_folder()
    if home is None:
        raise OutputError(f"there is no home to work in: name a folder ({FOLDER_VARIABLE})")
    wanted = home / "reproduce" / hash_of(record.content.decode())[:16]
    before = os.environ.get(FOLDER_VARIABLE)
    with ExitStack() as stack:
        folder = _hold_free(wanted, stack)
        os.environ[FOLDER_VARIABLE] = str(folder / "cache")
        try:
            yield folder
        finally:
            if before is None:
                del os.environ[FOLDER_VARIABLE]
            else:
                os.environ[FOLDER_VARIABLE] = before


def _hold_free(wanted: Path, stack: ExitStack) -> Path:
    """Make a folder that no other process works in, and hold it: ``wanted``, or one like it."""
    with raise_output_error(f"{wanted} (name another folder by {FOLDER_VARIABLE})"):
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            try:
                stack.enter_context(held(folder))
            except OutputError:
                if number > _MOST_AT_ONCE or not is_held(folder):
                    raise
            else:
                folder.mkdir(exist_ok=True)
                return folder
    raise AssertionError


def compare(
    record: Record,
    made: Record,
    promise: Promise,
    *,
    places: tuple[Path | None, Path],
    losses: Losses,
) -> Compared:
    """Compare a result that was made again with its record.

    A file is the same by its bytes, or by what it says without times, versions and names. Where
    bytes are not promised, numbers in computed texts may lie apart, and weights are the same by
    their losses. ``places`` are those of the result, if it is at hand, and of what was made.
    """
    made, done = made.of_part(record.part), Compared()
    renamed = any(read.name != made.read[name].name for name, read in record.read.items())
    is_near = bool(record.figures) and not promise.bytes
    for name, how in changed(record.files, made.files).items():
        if how == OTHER and record.said.get(name, "") == made.said.get(name):
            continue
        is_computed = name.endswith(_COMPUTED) or name.startswith("figures/")
        if how == OTHER and is_near and is_computed:
            _compare_near(record, name, places, losses, done)
        elif how == OTHER and name.endswith(CARD_FILE) and (renamed or promise.versions):
            done.unsure[name] = "it names versions and what was read, which are others here"
        else:
            done.differs.append(f"made again: {name} {how}")
    most = 0.0 if promise.bytes else NATS
    done.differs.extend(_other_figures(record.figures, made.figures, most))
    for package in promise.versions if done.differs and not is_near else ():
        has = made.versions.get(package)
        done.differs.append(f"{package} {record.versions[package]} has made it, here is {has}")
    return done


def _compare_near(
    record: Record, name: str, places: tuple[Path | None, Path], losses: Losses, done: Compared
) -> None:
    """Compare a computed file that has other bytes: weights by their losses, a text by numbers."""
    if name.endswith(_WEIGHTS) and name != SCAN_FILE:
        measured = losses(name)
        if measured is None:
            done.unsure[name] = "its weights are not at hand to be measured"
        elif not abs(measured[0] - measured[1]) <= NATS:
            lost = f"{measured[0]:.4f} nats measured on its weights, expected {measured[1]:.4f}"
            done.differs.append(f"result: {name}: {lost}")
    elif places[0] is None or not _are_near(
        *(text_of(record, file_in(one, name)) for one in places if one)
    ):
        done.unsure[name] = "another machine computes other digits"


def _are_near(text: str, other: str) -> bool:
    """Whether two texts say the same, but for numbers that lie near one another."""
    pairs = zip(*(map(float, _NUMBER.findall(one)) for one in (text, other)), strict=False)
    return (
        bool(text)
        and _NUMBER.sub("", text) == _NUMBER.sub("", other)
        and all(isclose(*pair, rel_tol=NATS, abs_tol=NATS) for pair in pairs)
    )


def agreement(record: Record, made: Record, promise: Promise, unsure: Mapping[str, str]) -> str:
    """Say how far a result is that of its record, where nothing differs."""
    made = made.of_part(record.part)
    same = {*record.files.items()} & {*made.files.items()}
    files, figures = counted(len(record.files), "file"), counted(len(record.figures), "figure")
    files = files if len(same) == len(record.files) else f"{len(same)} of {files} to the byte"
    figures = (
        f"; {figures}{'' if promise.bytes else f' within {NATS} nats'}" if record.figures else ""
    )
    if not unsure:
        return f"the same: {files}{figures}"
    named = "; ".join(f"{name} ({why})" for name, why in sorted(unsure.items()))
    return f"the same but for {counted(len(unsure), 'file')} that could not be compared: {named}"
