"""Make a result again from its record, and compare: file by file, and figure by figure."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from glob import escape
from math import isclose
from pathlib import Path

from ..cutting.source import CARD_FILE
from ..errors import OutputError, raise_output_error
from ..merging.adapter_config import CONFIG_FILE as ADAPTERS_FILE
from ..models.dtypes import QUANTISED
from ..models.source import ModelSource
from ..processes import held
from ..storage import RECORD, RESULT_RECORD
from ..texts.sources import Texts
from ..values.counts import counted
from ..values.files import OF_ONE_MODEL, SCAN_FILE
from ..values.provenance import hash_of, versions
from ..values.tokens import Tokens
from .records import (
    MODELS,
    OTHER,
    TEXTS,
    Read,
    Record,
    changed,
    fetched,
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

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


@dataclass(frozen=True, slots=True)
class Promise:
    """What can be promised of a result that is made again here: its bytes, or losses within
    ``NATS``.

    ``versions`` are of packages that are of other versions here, which files name.
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


Compared = tuple[list[str], dict[str, str]]
"""What differs, a line each; and why a file could not be compared. All else is the same."""


def compare_result(record: Record, place: Path | str, store: Store) -> Compared:
    """Compare a result with its record; ModelError where one on the hub cannot be fetched."""
    folder, files = result_of(place, store)
    expected, lines, unsure = dict(record.files), [], {}
    for part in parts_of(record):
        name = f"{part}/{RESULT_RECORD}"
        expected[name] = hashlib.sha256(record.of_part(part).content).hexdigest()
    differ = changed(expected, files)
    for name, how in differ.items():
        is_mark = name.endswith(RECORD)  # which results on a card change, too
        card = name.removesuffix(RECORD) + CARD_FILE if is_mark else name
        is_told = card.endswith(CARD_FILE) and card in differ
        text = text_of(record, file_in(folder, name)) if is_told else ""
        if how == OTHER and text and hash_of(text) == record.said.get(name):
            unsure[name] = "its results, or marks of them, are not those of the record"
        else:
            lines.append(f"{name} {how}")
    if not (lines or record.part):
        try:
            figures = figures_of(folder, record.command)
        except (ValueError, KeyError, TypeError, AttributeError):
            figures = {}
        lines += _other_figures(record.figures, figures, 0.0)
    return [f"result: {line}" for line in lines], unsure


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
            small = [escape(one) for one in read.files if not one.endswith(".safetensors")]
            fetched(read.name, allow_patterns=small)  # what lies beside the weights
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
            os.environ.pop(FOLDER_VARIABLE)
            os.environ.update({} if before is None else {FOLDER_VARIABLE: before})


def _hold_free(wanted: Path, stack: ExitStack) -> Path:
    """Hold a folder that no other process works in: ``wanted``, or one of the next numbers."""
    with raise_output_error(f"{wanted} (name another folder by {FOLDER_VARIABLE})"):
        for number in range(2, 100):
            wanted.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(held(wanted))
                return wanted
            except OutputError:
                wanted = wanted.with_name(f"{wanted.name.partition('-')[0]}-{number}")
    raise OutputError(f"{wanted} and a hundred like it are in use")


def compare(
    record: Record,
    made: Record,
    promise: Promise,
    *,
    result: Path | str | None,
    folder: Path,
    places: Mapping[str, str],
) -> Compared:
    """Compare a result that was made again in ``folder`` with its record.

    A file is the same by its bytes, or by what it says without times, versions and names. Where
    bytes are not promised, numbers in computed texts may lie apart, and the weights of the result
    are measured on the texts of ``places``.
    """
    made, near = made.of_part(record.part), bool(record.figures) and not promise.bytes
    base, lines, unsure, weights = folder / record.out / record.part, [], dict[str, str](), set()
    renamed = any(read.name != made.read[name].name for name, read in record.read.items())
    for name, how in changed(record.files, made.files).items():
        if how == OTHER and record.said.get(name, "") == made.said.get(name):
            continue
        is_computed = near and (name.endswith(_COMPUTED) or name.startswith("figures/"))
        is_worded = name.endswith(CARD_FILE) and (renamed or bool(promise.versions))
        if how != OTHER or not (is_computed or is_worded):
            lines.append(f"made again: {name} {how}")
        elif result and name.endswith(_WEIGHTS) and name != SCAN_FILE:
            weights.add(Path(name) if name.endswith(".gguf") else Path(name).parent)
        elif not (near and _are_near(record, name, result, base)):
            unsure[name] = "other versions, processors or names of the source write another one"
    for inside in sorted(weights):
        both = (Path(result or "", inside), base / inside)
        had, has = (_loss(record, one, places, folder) for one in both)
        if not abs(had - has) <= NATS:
            told = f"{had:.4f} nats measured on its weights, {has:.4f} on those made again"
            lines.append(f"result: {Path(record.out, inside)}: {told}")
    lines += _other_figures(record.figures, made.figures, 0.0 if promise.bytes else NATS)
    for name in promise.versions if lines and not near else ():
        version = record.versions[name]
        lines.append(f"{name} {version} has made it, here is {made.versions.get(name)}")
    return lines, unsure


def _loss(record: Record, place: Path, places: Mapping[str, str], folder: Path) -> float:
    """Measure a model, or adapters on their cut, on at most 64 of the texts of a record."""
    from ..evaluation.loss import evaluate_loss
    from ..merging.merge import merge

    trusted = bool(record.settings.get("trust_remote_code"))
    if (place / ADAPTERS_FILE).is_file():
        merged = folder / "merged"
        merge(place, merged, places["model"], overwrite=True, trust_remote_code=trusted)
        place = merged
    name = "eval_texts" if "eval_texts" in places else "texts"
    texts = Texts(places[name], min(record.settings.get(TEXTS[name]) or 64, 64))
    source = ModelSource(str(place), trust_remote_code=trusted)
    length = record.settings.get("max_length") or Tokens().max_length
    return evaluate_loss(*source.load(), texts, max_length=length).nats


def _are_near(record: Record, name: str, result: Path | str | None, made: Path) -> bool:
    """Whether a text says the same as made again, but for numbers that lie near one another."""
    if not isinstance(result, Path):
        return False
    text, other = (text_of(record, file_in(one, name)) for one in (result, made))
    pairs = zip(*(map(float, _NUMBER.findall(one)) for one in (text, other)), strict=False)
    is_alike = bool(text) and _NUMBER.sub("", text) == _NUMBER.sub("", other)
    return is_alike and all(isclose(*pair, rel_tol=NATS, abs_tol=NATS) for pair in pairs)


def agreement(record: Record, made: Record, promise: Promise, *, unsure: Mapping[str, str]) -> str:
    """Say how far a result is that of its record, where nothing differs."""
    if unsure:
        named = "; ".join(f"{name} ({why})" for name, why in sorted(unsure.items()))
        return (
            f"the same but for {counted(len(unsure), 'file')} that could not be compared: {named}"
        )
    same = {*record.files.items()} & {*made.of_part(record.part).files.items()}
    files, figures = counted(len(record.files), "file"), counted(len(record.figures), "figure")
    files = files if len(same) == len(record.files) else f"{len(same)} of {files} to the byte"
    if not record.figures:
        return f"the same: {files}"
    return f"the same: {files}; {figures}{'' if promise.bytes else f' within {NATS} nats'}"
