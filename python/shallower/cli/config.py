"""``--config``: options of a command from a YAML file; the command line has the last word."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SettingsError, why


def _configured(context: typer.Context, place: Path | None) -> Path | None:
    """Make the values of a file the defaults of the other options."""
    if place is not None and not context.resilient_parsing:
        context.default_map = _values(place, _read(place), context)
    return place


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        rich_help_panel="target",
        is_eager=True,
        callback=_configured,
        help="YAML with models and options by their names, as n: [2, 4]; options given here win.",
    ),
]


def _read(place: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = place.read_bytes()
        root = yaml.compose(content, yaml.SafeLoader)
        found = yaml.safe_load(content)
    except yaml.MarkedYAMLError as error:  # no key can be named
        line = 1 + getattr(error.problem_mark, "line", 0)
        raise SettingsError(f"{place}, line {line}: {error.problem} (--config)") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{place} cannot be read: {why(error, place)} (--config)") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{place}: expected options by their names, as n: [2, 4] (--config)")
    keys = [str(key.value).replace("-", "_") for key, _ in root.value]
    for key in keys:  # of one that is there twice YAML takes the last
        if keys.count(key) > 1:
            raise SettingsError(f"{place}: the key {key} is there twice (--config)")
    return found


def _values(place: Path, given: Mapping[str, Any], context: typer.Context) -> dict[str, Any]:
    """The values by the names of parameters; SettingsError for a key that is none of theirs."""
    known = {
        word.lstrip("-").replace("-", "_"): one
        for one in context.command.params
        for word in one.opts
        if one.name not in ("config", "help_all", "list_criteria")
    }
    values = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"expected of {', '.join(known)}"
            raise SettingsError(f"{place}: there is no key {key}: {meant} (--config)")
        values[str(known[name].name)] = _value(f"{place}: {key}", value, known[name], context)
    return values


def _value(key: str, value: Any, of: Any, context: typer.Context) -> Any:
    """A value as the command line has it; SettingsError where the option takes none such."""
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str | int | float) for word in words):
        raise SettingsError(
            f"{key}: expected a value, or a list of values, got {value!r} (--config)"
        )
    read: Any = [word if isinstance(word, bool) else str(word) for word in words]
    if of.nargs == 1 and not getattr(of, "multiple", False):
        read = read[0] if len(read) == 1 else ",".join(map(str, read))
    try:
        of.process_value(context, read)
    except typer.BadParameter as error:
        said = error.message.removeprefix("Value error, ").removesuffix(".")
        raise SettingsError(f"{key}: got {value!r}: {said} (--config)") from error
    return read
