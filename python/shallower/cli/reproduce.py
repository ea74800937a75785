"""``shallower reproduce``."""

import contextlib
import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ModelError, OutputError, ShallowerError, why
from ..processes import is_main_process
from ..settings.options import Group, Option
from . import parser
from .options import DryRun, Json, TrustRemoteCode
from .output import called, print_json, remember_call, say_dry_run, show, warn

if TYPE_CHECKING:
    from ..store.again import Promise
    from ..store.records import Record


def _read(what: str, group: Group = "basic") -> Option:
    return Option(f"{what}, where the record names no repository.", "PLACE", group)


def reproduce_command(
    place: Annotated[
        str,
        typer.Argument(
            metavar="RESULT", help="A folder, a GGUF file, a record, or a hub id that has one."
        ),
    ],
    *,
    model: Annotated[str | None, _read("The model that was read")] = None,
    original: Annotated[str | None, _read("The uncut model of a healing", "repair")] = None,
    adapters: Annotated[str | None, _read("The adapters of a merge", "repair")] = None,
    texts: Annotated[str | None, _read("The texts")] = None,
    eval_texts: Annotated[str | None, _read("The held-out texts")] = None,
    answers: Annotated[str | None, _read("The file of prompts, of --answers", "repair")] = None,
    speech: Annotated[str | None, _read("The file of prompts, of --speech", "measures")] = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a result again from its record, and compare all of it.

    The record lies beside what prune, run, patch, heal and merge have written. First it says what
    it can promise here. A cut has the same bytes on any machine. What is computed has them with the
    same processor, instructions and threads, and elsewhere the same losses within 0.02 nats. What
    was read is compared by its SHA-256 before anything long. Each difference is a line. The exit
    status is 1 if something differs, or could not be compared. When interrupted, the same command
    resumes.
    """
    from ..store.again import compare_result, find_reads, promise_of
    from ..store.records import find_record
    from ..store.store import open_store

    result, record = find_record(place)
    given = {
        "model": model, "original": original, "adapters": adapters, "texts": texts,
        "eval_texts": eval_texts, "answers": answers, "prompts": speech,
    }  # fmt: skip
    _check_options(record, trust_remote_code)
    store = open_store()
    places, lines = find_reads(record, given, store)
    others, unsure = ([], {}) if result is None else compare_result(record, result, store)
    lines, done, promise = lines + others, "", promise_of(record)
    if not as_json and not dry_run:
        show(f"promised: {promise.why}")
    if not lines and dry_run:
        say_dry_run({"reproduce": place, "promised": promise.why, "write": []}, as_json)
        return
    if not lines:
        lines, done = _compare_again(record, places, promise, result=result, unsure=unsure)
    if as_json:
        told = {"differences": lines, "not_compared": unsure, "files": dict(record.files)}
        print_json({"promised": promise.why, **told})
    else:
        show(*lines, *filter(None, [done]))
    if lines or unsure:
        raise typer.Exit(1)


def _compare_again(
    record: "Record",
    places: Mapping[str, str],
    promise: "Promise",
    *,
    result: Path | str | None,
    unsure: dict[str, str],
) -> tuple[list[str], str]:
    """Make a result again; what differs, a line each, and what is to be said at the end."""
    from ..store.again import agreement, compare, working_folder

    with working_folder(record) as folder:
        made = _make(record, places, folder)
        out = folder / "made"
        lines, more = compare(record, made, promise, result=result, folder=out, places=places)
        unsure |= more
        if not lines and not unsure:
            rmtree(folder)
    said = [] if lines else [agreement(record, made, promise, unsure=unsure)]
    said += [f"what was made again stays in {out} until the next call"] * bool(lines or unsure)
    return lines, "\n".join(said)


def _check_options(record: "Record", trust_remote_code: bool) -> None:
    """Refuse options that the command has not, or that nobody has allowed here."""
    from ..store.records import settings_of
    from . import HELP, RECORDED, _has, _with_values

    if record.command not in RECORDED:
        raise OutputError(f"the record is of a command that leaves none: {record.command}")
    command = parser(record.command)
    unknown = {*record.settings} - {one.name for one in command.params}
    if unknown:
        raise OutputError(f"the record names options that there are not: {', '.join(unknown)}")
    name, *words = shlex.split(record.call)[1:] or [""]
    is_its = name == record.command and not _has(words, *HELP)
    plain = _plain(command, _with_values(command, words)) if is_its else {"out": ""}
    if (Path(plain["out"]).name, settings_of(plain, record)) != (record.out, record.settings):
        raise OutputError(f"the settings of the record are not those of its call: {record.call}")
    if record.settings.get("trust_remote_code") and not trust_remote_code:
        raise ModelError(
            "the model was loaded with code of its own, which nothing runs unasked: allow it "
            "(--trust-remote-code)"
        )


def _make(record: "Record", places: Mapping[str, str], folder: Path) -> "Record":
    """Carry the command of a record out; gives the record of what it has written."""
    from ..store.records import record_of
    from ..store.store import open_store

    given = {**record.settings, **places, "overwrite": True}
    given["out"] = str(folder / "made" / record.out)
    for name, text in record.plans.items():
        kind = "json" if text.lstrip().startswith("{") else "txt"  # a list of experts
        given[name] = str(folder / f"{name}.{kind}")
        Path(given[name]).write_text(text, encoding="utf-8")
    command = parser(record.command)
    words = _words(command, given)
    remember_call(record.command, shlex.split(record.call)[2:])
    with contextlib.redirect_stdout(io.StringIO()):  # which names a folder that goes again
        status = command.main(words, prog_name="shallower", standalone_mode=False)
    if status:  # it was interrupted
        raise typer.Exit(status)
    return record_of(record.command, record.call, given, store=open_store())


def keep_record(name: str, command: Any, words: Sequence[str]) -> None:
    """Write the record of what a call has made, unless it was there, or nothing was to be made."""
    from ..store.records import is_recorded, write_record
    from ..store.store import open_store

    given = _plain(command, words)
    if given.get("dry_run") or not is_main_process() or is_recorded(Path(given["out"])):
        return
    try:
        write_record(name, called(), given, store=open_store(bool(given.get("no_cache"))))
    except (OSError, ValueError, ShallowerError) as error:
        warn(f"no record of how it was made is written: {why(error)}")


def _plain(command: Any, words: Sequence[str]) -> dict[str, Any]:
    """Read the options of a call as plain values, without those that are off."""
    given = command.make_context(command.name, [*words]).params
    off = [one.name for one in command.params if not one.secondary_opts and not given.get(one.name)]
    return {
        key: str(one) if isinstance(one, Path) else one
        for key, one in given.items()
        if not (key in off and one is False)
    }


def _words(command: Any, given: Mapping[str, Any]) -> list[str]:
    """Write the options of a call as its words."""
    words: list[str] = []
    arguments: list[str] = []
    for one in command.params:
        value = given.get(one.name)
        if value is None:
            continue
        if one.param_type_name == "argument":
            arguments.append(str(value))
        elif getattr(one, "is_flag", False):
            words += one.opts[:1] if value is True else one.secondary_opts[:1]
        else:
            words.append(f"{one.opts[0]}={value}")
    return [*words, "--", *arguments]
