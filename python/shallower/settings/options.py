"""What makes a field of settings an option; ``cli/options.py`` makes it one of a command."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from ..errors import CriterionError, LayersError, SettingsError
from ..values.provenance import option_words
from ..values.tokens import BatchSize, Tokens, parse_batch_size

T = TypeVar("T")

THREADS = "Threads of the core; all processors by default."
"""The sentence of ``--threads``, of a scan and of studies."""

TEXT_ONLY = "Save the text part alone: no towers, no heads of more tokens, none of their config."
"""The sentence of ``--text-only``, of all that save a cut."""


Group = Literal["basic", "target", "repair", "measures", "memory", "sharing", "output"]
"""The groups of the help, in their order: what is not basic is behind ``--help-all``."""


@dataclass(frozen=True)
class Option:
    """An option of the command line, beside the type and the default of its field."""

    sentence: str  # its help
    metavar: str | None = None  # stands for the value in the help
    group: Group = "basic"  # of the help, behind those declared before it
    _: KW_ONLY
    name: str = ""  # its name with underscores; by default that of the field
    least: int | None = None  # the smallest number
    read: Callable[[str], Any] | None = None  # makes the value of a word
    alone: Any = ...  # the value without a word; `...` where there must be one
    off: tuple[str, Any] | None = None  # the help of `--no-NAME`, and the value by it

    def words(self, value: Any) -> dict[str, Any]:
        """Give the option of a value by its name; none where only Python can set the value."""
        if value is False or (self.off is not None and value == self.off[1]):
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


def _declared(
    group: Group, default: T, sentence: str, metavar: str | None = None, **more: Any
) -> T:
    """Declare a field of settings by its default, and its option as :class:`Option` has it."""
    return field(default=default, metadata={"option": Option(sentence, metavar, group, **more)})


basic, target = partial(_declared, "basic"), partial(_declared, "target")
repair = partial(_declared, "repair")
measures, memory = partial(_declared, "measures"), partial(_declared, "memory")
sharing, output = partial(_declared, "sharing"), partial(_declared, "output")


def options_of(kind: type) -> dict[str, Option]:
    """The options of settings, by their fields, in the order of the help.

    A field that a class declares anew stands there; without an option it keeps that of its base.
    """
    found: dict[str, Option] = {}
    for base in reversed(kind.__mro__[:-1]):
        declared = {one.name: one.metadata.get("option") for one in fields(base)}
        for name in get_annotations(base):
            if one := declared.get(name):
                found.pop(name, None)
                found[name] = replace(one, name=one.name or name)
    return found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every work on texts can be set to; TextsError for a number that is out of range."""

    max_length: int = measures(256, "Tokens of a text at most.", "N", least=1)
    batch_size: BatchSize = memory(  # noqa: RUF009
        "auto",
        "Texts in one forward. auto: as many as the device has memory for, on a CPU 8 at most.",
        "auto|N",
        read=parse_batch_size,
    )

    def __post_init__(self) -> None:
        _ = self.tokens

    @classmethod
    def of(cls, settings: Self | None, options: Mapping[str, Any]) -> Self:
        """Make settings from a value and from keywords that change it.

        Raises:
            SettingsError: there is no setting of that name, or ``settings`` is of another study.
        """
        if settings is not None and not isinstance(settings, cls):
            raise SettingsError(
                f"settings of type {type(settings).__name__}: expected {cls.__name__}"
            )
        names = [one.name for one in fields(cls)]
        for name in options:
            if name not in names:
                near = get_close_matches(name, names, 1)
                meant = f"did you mean {near[0]}?" if near else f"expected of {', '.join(names)}"
                raise SettingsError(f"{cls.__name__} has no setting {name!r}: {meant}")
        return cls(**options) if settings is None else replace(settings, **options)

    @property
    def tokens(self) -> Tokens:
        """The length of texts and how many make one forward."""
        return Tokens(self.max_length, self.batch_size)

    def to_words(self) -> list[str]:
        """Give the settings that are not the defaults as options, without those of Python alone."""
        default, options = type(self)(), options_of(type(self))
        changed: dict[str, Any] = {}
        for name in (one.name for one in fields(self) if one.name in options):
            value = getattr(self, name)
            if value != getattr(default, name):
                changed |= options[name].words(value)
        return option_words(changed)

    def _check_least(self, name: str, least: int, error: type[Exception] = LayersError) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            option = name.replace("_", "-")
            raise error(
                f"{name} = {value!r}: expected a whole number, at least {least} (--{option})"
            )


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
