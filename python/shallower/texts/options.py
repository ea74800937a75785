"""Items of a task: a context, and options that continue it, one of which is right."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from ..errors import TextsError
from .sources import read_items

_CONTEXT = ("context", "query", "question")
_OPTIONS = ("options", "choices")


@dataclass(frozen=True, slots=True)
class OptionItem:
    """A context with options that continue it, of which one is right."""

    context: str
    options: tuple[str, ...]  # two at least
    answer: int  # index of the right one
    line: int = field(default=0, compare=False)  # the line in its file, for errors


def read_options(source: str | Path) -> list[OptionItem]:
    """Read a file of items, a JSON object a line.

    The fields are ``context`` (also called ``query`` or ``question``), a string; ``options`` (also
    called ``choices``), a list of strings; and ``answer``, the index of the right option, from 0
    on. Others are ignored. A TextsError names the line.
    """
    return read_items(
        source, "options", fields="the fields context, options and answer", read=_item
    )


def options_fingerprint(items: Iterable[OptionItem]) -> str:
    """SHA-256 of the contexts, options and answers of items, whatever file they are in."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.context, item.options, item.answer]).encode() + b"\n")
    return digest.hexdigest()


def _item(record: object, line: int, place: str) -> OptionItem:
    if not isinstance(record, dict):
        raise TextsError(
            f"{place}: expected a JSON object with the fields context, options and answer, got "
            f"{_name(record)}"
        )
    context = _field(record, _CONTEXT, place)
    if not _is_text(context):
        raise TextsError(f"{place}: the context must be a string, got {_name(context)}")
    options = _field(record, _OPTIONS, place)
    if not isinstance(options, list) or len(options) < 2:
        raise TextsError(
            f"{place}: the options must be a list of at least 2 strings, got {_name(options)}"
        )
    for index, option in enumerate(options):
        if not _is_text(option) or not option.strip():
            raise TextsError(
                f"{place}: option {index} must be a string that is not blank, got {_name(option)}"
            )
    answer = _field(record, ("answer",), place)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        way_out = (
            "; write true as the index of its option, as 1 of [no, yes]"
            if isinstance(answer, bool)
            else ""
        )
        raise TextsError(
            f"{place}: the answer must be the index of the right option, an integer from 0 to "
            f"{len(options) - 1}, got {_name(answer)}{way_out}"
        )
    return OptionItem(context, tuple(options), answer, line)


def _field(record: dict[str, object], names: tuple[str, ...], place: str) -> object:
    there = [name for name in names if name in record]
    if len(there) > 1:
        raise TextsError(
            f"{place}: {' and '.join(there)} mean the same: write all of it into {names[0]} alone"
        )
    if not there:
        others = f" (or {' or '.join(names[1:])})" if names[1:] else ""
        raise TextsError(f"{place}: there is no field {names[0]}{others}")
    return record[there[0]]


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string that UTF-8 can hold; JSON may have halves of surrogate pairs."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _name(value: object) -> str:
    """Name a value that was not expected, shortly."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and not _is_text(value):
        return "a string that is not UTF-8"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
