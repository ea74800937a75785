"""The records beside results: made of what a call has named and written, and found again."""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from .._core import tier
from ..cutting.exports import EXPORT_FILES, export_path
from ..cutting.from_hub import UNVERIFIED
from ..cutting.metadata import without_results
from ..cutting.plans import experts_path, plan_file
from ..cutting.source import CARD_FILE, HUB_ID, hub_id, module_folders, place_name
from ..errors import OutputError, raise_output_error, why
from ..merging.adapter_config import remembered_base
from ..models.source import ModelSource
from ..processes import first_processor, num_processes, processors
from ..storage import RECORD, RESULT_RECORD, foreign, sha256_of, write_file
from ..texts.hub import raise_fetch_error
from ..texts.sources import HUB_DATASET, Texts
from ..values.experts import experts_file
from ..values.files import (
    CHECKPOINT_FOLDER,
    HEALED_FOLDER,
    HEALING_FILE,
    PATCH_FILE,
    PLAN_FILE,
    REPORT_FILE,
    RESULTS_FILE,
)
from ..values.provenance import hash_of, versions
from ..values.schema import fields_of, of_type, plain_fields
from .inputs import (
    hash_of_card,
    hashes_of,
    machine,
    model_files,
    stated_hashes,
    texts_content,
)
from .store import Store

WITHOUT_EFFECT = ("out", "overwrite", "no_cache", "dry_run", "as_json", "threads", "device_memory")

VERSION = 2

NOT_VERIFIED = " (the parts that were fetched, not verified)"

MODELS = ("model", "original", "adapters")
TEXTS = {"texts": "max_texts", "eval_texts": "max_eval_texts"}
"""Options that name texts, each with the option of how many of them are read."""

PROMPTS = ("answers", "prompts")
PLANS = ("plan", "drop_experts")


@dataclass(frozen=True, slots=True)
class Read:
    """A model, texts or a file that a command read, by content.

    Attributes:
        name: its hub id, or the last part of its place.
        commit: of a repository on the hub, empty where it is not known; None for a place here.
        files: the SHA-256 of each file, of safetensors on the hub as that states it; of texts one
            of all that were read, under ``texts``; none of a dataset too large to be read for this.
            Of a file of which parts alone were fetched, that of what was received, too.
        count: texts that were read; None for what are no texts.
    """

    name: str
    commit: str | None
    files: Mapping[str, str]
    count: int | None = None

    def differences(self, other: "Read", what: str) -> list[str]:
        """Say what of another one is not as it is here, a line each.

        Of a repository the hub's cache may have some files alone.
        """
        if self.count != other.count and self.count is not None:
            return [f"{what}: {other.count} texts were read, expected {self.count} ({self.name})"]
        mine, others = (
            {name: of.files[name] for name in of.files if not name.endswith(NOT_VERIFIED)}
            for of in (self, other)
        )
        if self.commit and other.commit:
            both = {*mine} & {*others}
            mine, others = ({name: of[name] for name in both} for of in (mine, others))
        return [f"{what}: {name} {how}" for name, how in changed(mine, others).items()]


@dataclass(frozen=True, slots=True)
class Record:
    """How a result was made.

    Attributes:
        command: by name.
        call: the command line that made it, which its card or page has.
        settings: its options by name, without places and what changes no result.
        out: the name of what it wrote.
        read: by option, what it read.
        plans: by option, the text of the plans and lists of experts that it read.
        files: the SHA-256 of each file that it wrote.
        said: a hash of what each text among them says, but for its times, versions and names.
        figures: losses in nats a token, by name.
        versions: the packages that made it.
        machine: the processor, the instructions that were chosen and the threads.
        part: the folder in the result that has this record, of the checkpoints of a run.
    """

    command: str
    call: str
    settings: Mapping[str, Any]
    out: str
    read: Mapping[str, Read]
    plans: Mapping[str, str]
    files: Mapping[str, str]
    said: Mapping[str, str]
    figures: Mapping[str, float]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    part: str = ""

    def of_part(self, part: str) -> "Record":
        """The record of a folder in the result; of all of it, if that has no name."""
        inside = f"{part}/" if part else ""
        files, said = (
            {name.removeprefix(inside): of[name] for name in of if name.startswith(inside)}
            for of in (self.files, self.said)
        )
        return replace(self, files=files, said=said, part=part)

    @property
    def content(self) -> bytes:
        """The bytes of its file: its fields, and their hash, so that no value of it can change."""
        fields = {"format": "shallower.record", "version": VERSION, **plain_fields(self)}
        return f"{json.dumps({**fields, 'digest': hash_of(fields)}, indent=2)}\n".encode()

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read a record; OutputError where there is none, or it cannot be read here."""
        try:
            content = path.read_bytes()
            data = of_type(dict, json.loads(content))
            if data.get("format") != "shallower.record":
                raise ValueError("it is of another tool")
            if of_type(int, data["version"]) > VERSION:
                raise ValueError(f"it is of version {data['version']}: update shallower")
            if data["version"] < VERSION:
                raise ValueError(
                    "it is of an earlier version, without a hash of its own: make the result again"
                )
            record = cls(**fields_of(cls, data))
            record._check()
            if record.content != content:
                raise ValueError("it has changed since it was written")
            return record
        except OSError as error:
            raise OutputError(
                f"no record of shallower can be read at {path}: {why(error, path)}; name a folder "
                f"or GGUF file that a command of shallower has written"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise OutputError(f"{path} is no record of shallower: {why(error)}") from error

    def _check(self) -> None:
        """Refuse what no command writes: ValueError."""
        shlex.split(self.call)  # ValueError
        named = {*MODELS, *TEXTS, "plan", "out"} & {*self.settings}
        named |= {*WITHOUT_EFFECT} & {*self.settings}
        named |= {name for name in PROMPTS if self.settings.get(name)}
        if named:
            raise ValueError(
                f"its settings name places, or what changes no result ({', '.join(sorted(named))})"
            )
        if {*self.plans} - {*PLANS} or {*self.read} - {*MODELS, *TEXTS, *PROMPTS}:
            raise ValueError("it names what no command reads")
        inside, experts = (self.settings.get(one) or "" for one in ("gguf_file", "drop_experts"))
        if Path(inside).is_absolute() or ".." in Path(inside).parts or experts_file(experts):
            raise ValueError(f"its settings name a file of this machine: {inside or experts}")
        if self.part not in ("", *(_PARTS if self.command == "run" else ())) or not self.files:
            raise ValueError(f"no result has a part {self.part!r} of {len(self.files)} files")
        if not all(map(math.isfinite, self.figures.values())):
            raise ValueError("a figure is not finite")
        if any(read.commit is None and not read.files for read in self.read.values()):
            raise ValueError("what was read has no hash")
        for name, read in self.read.items():
            pattern = HUB_ID if name in MODELS else HUB_DATASET
            if read.commit is not None and not pattern.fullmatch(read.name):
                raise ValueError(f"{read.name!r} is no repository of the hub")
        if self.out in ("", ".", "..") or Path(self.out).name != self.out:
            raise ValueError(f"{self.out!r} is no name of a result")


OTHER = "has other bytes"


def changed(expected: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """Name the files of two sets that differ, and say how: other bytes, missing, or new."""
    missing, new = ({*one} - {*other} for one, other in ((expected, found), (found, expected)))
    both = {name for name in {*expected} & {*found} if expected[name] != found[name]}
    how = {**dict.fromkeys(missing, "is missing"), **dict.fromkeys(new, "is new")}
    how |= dict.fromkeys(both, OTHER)
    return {
        name: how[name] if found.get(name, how) else "is a link to no file" for name in sorted(how)
    }


_BESIDE = (*EXPORT_FILES, PLAN_FILE)
_PARTS = (CHECKPOINT_FOLDER, HEALED_FOLDER)

_FOREIGN = (".git/", ".gitattributes", ".cache/")
"""How the names of what git and the hub add begin."""

_MOST_TEXT = 1 << 23
"""Bytes of a text that is compared by what it says."""

_VARYING = re.compile(
    r'"(seconds|tokens_per_second|_?name_or_path|base_model_name_or_path)": ?'
    r'("(\\.|[^"\\])*"|[^,}\s]+)|"(job|checkpoint)": ?("[0-9a-f]{64}"|null)'
)
"""Times, and names of places and of work, in JSON."""

_FIGURES = {
    PATCH_FILE: ("original", "cut", "patched"),
    RESULTS_FILE: ("recommended.whole", "recommended.cut", "recommended.patched",
                   "recommended.healed"),
}  # fmt: skip


def record_path(out: Path) -> Path:
    """The place of the record of a folder, or of a GGUF file."""
    return export_path(out, RESULT_RECORD) if out.suffix == ".gguf" else out / RESULT_RECORD


def option_of(name: str) -> str:
    """The option of what was read, by its name."""
    return f"--{'speech' if name == 'prompts' else name.replace('_', '-')}"


def is_recorded(out: Path) -> bool:
    """Whether the record of a result is there, and none of its files is newer."""
    place = record_path(out)
    if not place.is_file():
        return False
    made = [out] if out.suffix == ".gguf" else [one for one in out.rglob("*") if one.is_file()]
    return max(one.stat().st_mtime_ns for one in made) <= place.stat().st_mtime_ns


def record_of(command: str, call: str, given: Mapping[str, Any], *, store: Store) -> Record:
    """Describe what a command has written, and read, by its call and its options by name.

    OSError where a file cannot be read.
    """
    out = Path(given["out"])
    if command == "merge" and not given.get("model"):
        given = {**given, "model": remembered_base(Path(given["adapters"]))}
    plans = {name: text for name in PLANS if (text := _plan(name, given.get(name))) is not None}
    reads = {
        name: read_of(name, str(given[name]), command, given=given, store=store)
        for name in (*MODELS, *TEXTS, *PROMPTS)
        if given.get(name)
    }
    record = Record(
        command,
        call,
        {},
        out.name,
        reads,
        plans,
        _own(out, files_of(out, store)),
        {},
        figures_of(out, command),
        versions(),
        here(),
    )
    own = {name: one for name, one in record.files.items() if Path(name).name != RESULT_RECORD}
    texts = {name: text_of(record, file_in(out, name)) for name in own}
    said = {name: hash_of(one) for name, one in texts.items() if one}
    return replace(record, settings=settings_of(given, record), files=own, said=said)


def settings_of(given: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """The options of a call as JSON values, but for places and what changes no result."""
    others = {*record.read, *record.plans, *WITHOUT_EFFECT}
    found = {name: one for name, one in given.items() if name not in others and one is not None}
    return dict(json.loads(json.dumps(found)))


def here() -> dict[str, Any]:
    """Describe this machine, as far as the last bits of what it computes depend on it."""
    return {
        **machine(),
        "processor": first_processor().get("model name", ""),
        "tier": tier(),
        "threads": os.environ.get("OMP_NUM_THREADS") or str(processors()),
        "processes": num_processes(),
    }


def write_record(command: str, call: str, given: Mapping[str, Any], *, store: Store) -> None:
    """Write the record of what a command has just written beside it, and into its checkpoints."""
    record, out = record_of(command, call, given, store=store), Path(given["out"])
    for part in (*parts_of(record), ""):
        write_file(record_path(out / part), record.of_part(part).content)


def parts_of(record: Record) -> list[str]:
    """The folders in a result that have records of their own."""
    inside = {name.partition("/")[0] for name in record.files} if record.command == "run" else ()
    return [part for part in _PARTS if part in inside and not record.part]


def _plan(name: str, value: Any) -> str | None:
    """The text of a plan, or of a list of experts where it is a file."""
    if not value:
        return None
    path = experts_path(value) if name == "drop_experts" else plan_file(value)
    return None if path is None else path.expanduser().read_text(encoding="utf-8")


def read_of(name: str, value: str, command: str, *, given: Mapping[str, Any], store: Store) -> Read:
    """Hash what an option of a command names, by the others; OutputError where it is not there."""
    if name in TEXTS:
        return _read_texts(value, None if command == "run" else given.get(TEXTS[name]), store)
    shown = hub_id(value) or place_name(value)
    if name in MODELS:
        source = ModelSource(value, gguf_file=given.get("gguf_file"))
        try:
            files, commit = model_files(source)
        except (OSError, ValueError) as error:  # of the hub's client, too
            is_here = Path(value).expanduser().exists()
            said = why(error) if is_here else "it is not here, and the hub does not give it"
            raise OutputError(f"no model can be read at {value}: {said}") from error
        if source.is_gguf:
            return Read(shown, commit, {"": hashes_of(files, store)[0]})
        if not files:
            raise OutputError(f"there is no file of a model in {value}")
        folder = Path(os.path.commonpath([file.parent for file in files]))
        files += [path for one in module_folders(folder) for path in (folder / one).glob("*")]
        found = _hashes(folder, files, store)
        if (card := folder / CARD_FILE).is_file():  # whose results are of no cut
            found[CARD_FILE] = hash_of_card(card)
        received = UNVERIFIED.get((shown, commit or ""), {})
        parts = {name + NOT_VERIFIED: received[name] for name in received}
        return Read(shown, commit, {**stated_hashes(source, commit), **found, **parts})
    with raise_output_error(value):
        return Read(shown, None, {"": sha256_of(Path(value).expanduser())})


def _read_texts(value: str, limit: int | None, store: Store) -> Read:
    """Hash texts; a run divides them, so that it may read more than those that it fits."""
    texts, is_here = Texts(value, limit), Path(value).expanduser().exists()
    if not is_here and limit is None:
        return Read(value, "", {})
    content = texts_content(texts, store)
    if content is None:
        raise OutputError(f"no texts can be read at {value}")
    name, commit = (place_name(value), None) if is_here else (value, "")
    return Read(name, commit, {"texts": content["sha256"]}, content["texts"])


def files_of(out: Path, store: Store) -> dict[str, str]:
    """Hash the files of a result by their names, but for its record.

    A link that leads to no file has no hash.
    """
    if out.suffix == ".gguf":
        return _hashes(out.parent, [out, *(export_path(out, one) for one in _BESIDE)], store)
    paths = {path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*"))}
    paths.pop(RESULT_RECORD, None)
    ours = {name: paths[name] for name in paths if not name.startswith(_FOREIGN)}
    links = [name for name, path in ours.items() if path.is_symlink() and not path.is_file()]
    return {**_hashes(out, ours.values(), store), **dict.fromkeys(links, "")}


def _own(out: Path, found: Mapping[str, str]) -> dict[str, str]:
    """The files of a result that were written there, and not what somebody has put beside them."""
    tops = [top for top in ("", *(f"{part}/" for part in _PARTS)) if (out / top / RECORD).is_file()]
    strange = tuple(f"{top}{name}" for top in tops for name in foreign(out / top))
    return {
        name: found[name]
        for name in found
        if not any(name == one or (one[-1] == "/" and name.startswith(one)) for one in strange)
    }


def file_in(out: Path, name: str) -> Path:
    """A file of a result by its name."""
    return (out.parent if out.suffix == ".gguf" else out) / name


def _hashes(folder: Path, paths: Iterable[Path], store: Store) -> dict[str, str]:
    """Hash the files among paths in a folder by their places in it."""
    places = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return dict(zip(places, hashes_of([*places.values()], store), strict=True))


def text_of(record: Record, path: Path) -> str:
    """Read what a file of a result says, as another machine and other versions would say it.

    Without times, versions, names of what was read, a card's results, and marks of other files.
    Empty for what is no text, or a large one.
    """
    try:
        text = path.read_bytes().decode() if path.stat().st_size <= _MOST_TEXT else ""
        if path.suffix == ".json":
            value = json.loads(text)
            value = sorted(value["files"]) if path.name == RECORD else value
            text = json.dumps(value, sort_keys=True, indent=1)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    text = without_results(text) if path.name.endswith(CARD_FILE) else text
    text = _VARYING.sub("", text)
    for package, version in record.versions.items():
        told = rf'"?\b{package}(_version)?"?:? ?"?{re.escape(version)}(?![\w.])"?,?\s*'
        text = re.sub(told, "", text)
    for name, read in record.read.items():
        text = re.sub(rf"(?<!\w)([\w.-]+/)*{re.escape(read.name)}(?!\w)", name, text)
    return text


def figures_of(out: Path, command: str) -> dict[str, float]:
    """The losses that a result tells of, in nats a token, by name; a merge copies a healing's."""
    found: dict[str, float] = {}
    if command == "merge":
        return found
    for file, names in _FIGURES.items():
        values = _json(out / file)
        for name in names:
            value: Any = values
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, float):
                found[f"{file}: {name}"] = value
    healed = _json(out / HEALING_FILE).get("held_out", [])
    losses = {f"{HEALING_FILE}: held-out loss at step {one['step']}": one["nats"] for one in healed}
    return found | {name: nats for name, nats in losses.items() if nats is not None}  # not finite


def _json(path: Path) -> dict[str, Any]:
    return of_type(dict, json.loads(path.read_bytes())) if path.is_file() else {}


def find_record(place: str) -> tuple[Path | str | None, Record]:
    """Give the result, if any is at hand, and its record; OutputError where there is none.

    A result on the hub is given by its id.
    """
    path = Path(place).expanduser()
    if path.stem == Path(REPORT_FILE).stem and path.is_file():  # the page of a run, or its data
        path = path.parent
    if path.name.endswith(RESULT_RECORD) or (path.suffix == ".json" and path.is_file()):
        return None, Record.load(path)
    if not path.exists() and hub_id(place) is not None:
        return place, Record.load(_on_the_hub(place))
    return path, Record.load(record_path(path))


def fetched(name: str, **options: Any) -> Path:
    """A folder of the hub's cache with the files of a repository; raises as :func:`result_of`."""
    from huggingface_hub import snapshot_download

    with raise_fetch_error(name):
        return Path(snapshot_download(name, **options))


def result_of(place: Path | str, store: Store) -> tuple[Path, dict[str, str]]:
    """Give the folder or GGUF file of a result, and its files by :func:`files_of`.

    Of one on the hub large files are those that the hub states; ModelError where it does not give
    the others.
    """
    if isinstance(place, Path):
        return place, files_of(place, store)
    commit = _on_the_hub(place).parent.name
    stated = stated_hashes(ModelSource(place), commit)
    folder = fetched(place, revision=commit, ignore_patterns=[escape(one) for one in stated])
    return folder, {**files_of(folder, store), **stated}


def _on_the_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, RESULT_RECORD))
    except (OSError, ValueError) as error:  # all of the hub's errors are one of these
        raise OutputError(
            f"there is no {RESULT_RECORD} in {name} on the hub, or the hub cannot be reached; name "
            f"a folder or GGUF file that a command of shallower has written"
        ) from error
