"""What makes a field of settings an option; ``cli/options.py`` makes it one of a command."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import get_annotations
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CriterionError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of the command line, beside the type and the default of its field.

    Attributes:
        sentence: its help.
        metavar: stands for its value in the help.
        name: its name, with underscores; by default that of the field.
        least: the smallest number.
        read: makes the value of a word.
        alone: the value of the option without a word; ``...`` where there must be one.
        off: the help of ``--no-NAME``, and the value of the field by it.
        before: what it stands before in the help: a field or a parameter of the command. By
            default it stands behind the field before it.
    """

    sentence: str
    metavar: str | None = None
    name: str = ""
    least: int | None = None
    read: Callable[[str], Any] | None = None
    alone: Any = ...
    off: tuple[str, Any] | None = None
    before: str | None = None

    def words(self, value: Any) -> dict[str, Any]:
        """Give the option of a value by its name; none where only Python can set the value."""
        if self.off is not None and value == self.off[1]:
            return {f"no_{self.name}": True}
        if value is self.alone:
            return {self.name: True}
        if isinstance(value, Path):
            return {self.name: value.name}
        if isinstance(value, str | int | float):
            return {self.name: value}
        if self.read is not None and isinstance(value, Sequence):
            return {self.name: ",".join(str(getattr(one, "name", one)) for one in value)}
        return {}


def option(default: T, sentence: str, metavar: str | None = None, **more: Any) -> T:
    """Declare a field of settings by its default, and its option as :class:`Option` has it."""
    made = Option(sentence=sentence, metavar=metavar, **more)
    return field(default=default, metadata={"option": made})


def options_of(kind: type) -> dict[str, Option]:
    """The options of settings, by their fields, in the order of the help.

    A field that a class declares anew stands where it does so; without an option it keeps that of
    its base.
    """
    found: dict[str, Option] = {}
    for base in reversed(kind.__mro__[:-1]):
        declared = {one.name: one.metadata.get("option") for one in fields(base)}
        for name in get_annotations(base):
            if one := declared.get(name):
                found.pop(name, None)
                found[name] = replace(one, name=one.name or name)
    return found


def parse_names(listed: str) -> list[str]:
    """Read names, comma-separated."""
    return [name.strip() for name in listed.split(",")]


def distinct_names(what: str, names: Any) -> tuple[str, ...]:
    """Check names that are given; CriterionError for one string, which would be a name a letter."""
    option = f"({what}, --{what.replace('_', '-')})"
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise CriterionError(f"{what} must be a sequence of names, got {names!r} {option}")
    found = tuple(names)
    if not all(isinstance(name, str) and name for name in found):
        raise CriterionError(f"{what}: expected names, got {[*found]} {option}")
    refuse_twice(what, found)
    return found


def refuse_twice(what: str, names: Sequence[str]) -> None:
    """Refuse a name that is there twice, by a CriterionError."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise CriterionError(f"named twice: {', '.join(twice)} ({what}, --{what})")
