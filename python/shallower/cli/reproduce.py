"""``shallower reproduce``."""

import contextlib
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import parser
from .options import DryRun, Json, TrustRemoteCode
from .output import called, print_json, remember_call, say_dry_run, show, warn

if TYPE_CHECKING:
    from ..store.again import Losses
    from ..store.records import Record


def _read(what: str) -> Any:
    return typer.Option(metavar="PLACE", help=f"{what}, where the record names no repository.")


def reproduce_command(
    place: Annotated[
        str,
        typer.Argument(
            metavar="RESULT", help="A folder, a GGUF file, a record, or a hub id that has one."
        ),
    ],
    *,
    model: Annotated[str | None, _read("The model that was read")] = None,
    original: Annotated[str | None, _read("The uncut model of a healing")] = None,
    adapters: Annotated[str | None, _read("The adapters of a merge")] = None,
    texts: Annotated[str | None, _read("The texts")] = None,
    eval_texts: Annotated[str | None, _read("The held-out texts")] = None,
    answers: Annotated[str | None, _read("The file of prompts, of --answers")] = None,
    speech: Annotated[str | None, _read("The file of prompts, of --speech")] = None,
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
    from ..store.again import (
        agreement,
        compare,
        compare_result,
        find_reads,
        promise_of,
        working_folder,
    )
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
    folder, unsure, done = None, dict[str, str](), ""
    if result is not None:
        folder, compared = compare_result(record, result, store)
        lines, unsure = lines + compared.differs, compared.unsure
    promise = promise_of(record)
    if not as_json and not dry_run:
        show(f"promised: {promise.why}")
    if not lines and dry_run:
        say_dry_run({"reproduce": place, "promised": promise.why, "write": []}, as_json)
        return
    if not lines:
        with working_folder(record) as work:
            made = _make(record, places, work)
            both = (folder, work / "made" / record.out)
            measured = _losses(record, result, both[1], places)
            compared = compare(record, made, promise, places=both, losses=measured)
            lines, unsure = compared.differs, {**unsure, **compared.unsure}
            done = "" if lines else agreement(record, made, promise, unsure)
            if lines or unsure:
                kept = f"what was made again stays in {work / 'made'} until the next call"
                done = "\n".join(filter(None, [done, kept]))
            else:
                rmtree(work)
    if as_json:
        told = {"differences": lines, "not_compared": unsure, "files": dict(record.files)}
        print_json({"promised": promise.why, **told})
    else:
        show(*lines, *filter(None, [done]))
    if lines or unsure:
        raise typer.Exit(1)


def _check_options(record: "Record", trust_remote_code: bool) -> None:
    """Refuse options that the command has not, or that nobody has allowed here."""
    from ..errors import ModelError, OutputError
    from ..store.records import settings_of
    from . import RECORDED, _with_values

    if record.command not in RECORDED:
        raise OutputError(f"the record is of a command that leaves none: {record.command}")
    command = parser(record.command)
    unknown = {*record.settings} - {one.name for one in command.params}
    if unknown:
        raise OutputError(f"the record names options that there are not: {', '.join(unknown)}")
    name, *words = shlex.split(record.call)[1:] or [""]
    plain = _plain(command, _with_values(command, words)) if name == record.command else {}
    if Path(plain.get("out", "")).name != record.out or settings_of(plain, record) != dict(
        record.settings
    ):
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
        given[name] = str(folder / f"{name}.json")
        Path(given[name]).write_text(text, encoding="utf-8")
    words = _words(parser(record.command), given)
    _printed(record.command, words, shlex.split(record.call)[2:])
    return record_of(record.command, record.call, given, open_store())


def _printed(name: str, words: Sequence[str], remembered: Sequence[str] = ()) -> str:
    """Carry a command out, and give what it prints, which names a folder that goes again."""
    remember_call(name, remembered or words)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = parser(name).main([*words], prog_name="shallower", standalone_mode=False)
    if status:  # it was interrupted
        raise typer.Exit(status)
    return printed.getvalue()


def _losses(
    record: "Record", result: Path | str | None, made: Path, places: Mapping[str, str]
) -> "Losses":
    """Measure weights by the texts of a record: those of a result, and those made again."""
    from ..store.records import file_in

    @cache
    def both(inside: str) -> tuple[float, float] | None:
        there = file_in(result, inside) if isinstance(result, Path) else result
        if there is None or (inside not in ("", ".") and there == result):
            return None
        return _loss(there, record, places), _loss(file_in(made, inside), record, places)

    return lambda name: both(name if name.endswith(".gguf") else str(Path(name).parent))


def _loss(place: Path | str, record: "Record", places: Mapping[str, str]) -> float:
    """Measure the loss of a model, or of adapters on their cut, on the texts of a record."""
    from ..store.records import ADAPTERS_FILE, TEXTS
    from ..store.store import store_folder

    options = {"trust_remote_code": record.settings.get("trust_remote_code")}
    if isinstance(place, Path) and (place / ADAPTERS_FILE).is_file():
        merged = (store_folder() or place) / "merged"
        given = {"adapters": place, "model": places["model"], "out": merged, "overwrite": True}
        _printed("merge", _words(parser("merge"), {**given, **options}))
        place = merged
    texts = "eval_texts" if "eval_texts" in places else "texts"
    most = min(record.settings.get(TEXTS[texts]) or _MEASURED, _MEASURED)
    options |= {"max_length": record.settings.get("max_length"), "as_json": True}
    given = {"model": place, "texts": places[texts], "max_texts": most, **options}
    return float(json.loads(_printed("eval", _words(parser("eval"), given)))["base"]["nats"])


_MEASURED = 64
"""Texts at most on which weights are compared."""


def keep_record(name: str, command: Any, words: Sequence[str]) -> None:
    """Write the record of what a call has made, unless it was there, or nothing was to be made."""
    from ..errors import ShallowerError, why
    from ..processes import is_main_process
    from ..store.records import is_recorded, write_record
    from ..store.store import open_store

    given = _plain(command, words)
    if given.get("dry_run") or not is_main_process() or is_recorded(Path(given["out"])):
        return
    try:
        write_record(name, called(), given, open_store(bool(given.get("no_cache"))))
    except (OSError, ValueError, ShallowerError) as error:
        warn(f"no record of how it was made is written: {why(error)}")


def _plain(command: Any, words: Sequence[str]) -> dict[str, Any]:
    """Read the options of a call as plain values, without those that are off."""
    given = command.make_context(command.name, [*words]).params
    off = [one.name for one in command.params if not one.secondary_opts and not given[one.name]]
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
