"""The file of a sweep: YAML with a schema; an error names the file, the line and the key."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import SettingsError, ShallowerError, why
from ..models.source import ModelSource
from ..values.curve import State
from ..values.schema import of_type
from ..values.settings import CompareSettings, CurveSettings

_LOADING: dict[str, type] = {"dtype": str, "device_map": str, "trust_remote_code": bool}
"""How models are loaded: keys of the file, and of a single model."""

_COMMON = ("max_length", "batch_size", "max_texts", "max_eval_texts", "seed")
"""Settings of comparisons and curves."""

_OF_MODEL, _OF_TEXTS = ("model", "name", *_LOADING), ("texts", "name")

_REQUIRED = ("models", "texts", "eval_texts")

KEYS = (
    *_REQUIRED, "criteria", "n", "states", "heal_steps", "losses", *_LOADING, *_COMMON,
)  # fmt: skip
"""The keys of a sweep's file."""


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """What a sweep is of, as its file says.

    Attributes:
        path: of the file.
        models: by the names that they have in the sweep.
        texts: places of calibration texts, by name.
        eval_texts: the place of the texts that report.
        settings: of every comparison.
        healing: of the curves of healed cuts, without strategies and sizes; None without
            ``healed`` among the states.
        states: in which cuts are looked at.
        losses: nats a token above the whole model, at which the share of layers is told.
        lines: of keys, and of single models and texts, by their names.
    """

    path: Path
    models: Mapping[str, ModelSource]
    texts: Mapping[str, str]
    eval_texts: str
    settings: CompareSettings
    healing: CurveSettings | None
    states: tuple[State, ...]
    losses: tuple[float, ...]
    lines: Mapping[str, int] = field(repr=False)

    @contextmanager
    def at(self, *keys: str) -> Iterator[None]:
        """Name the file, and the line of the first key that is there, in errors of the body."""
        with _at(self.path, next((key, self.lines[key]) for key in keys if key in self.lines)):
            yield

    def healed(self, strategies: Sequence[str], *n: int) -> CurveSettings:
        """The settings of a curve of healed cuts."""
        assert self.healing is not None
        return replace(self.healing, strategies=tuple(strategies), n=n)


def read_sweep(path: Path) -> SweepFile:
    """Read the file of a sweep; nothing that it names is looked at.

    Raises:
        SettingsError: it cannot be read, is no YAML, or has keys or values that no sweep has.
    """
    return _Reader(path).read()


@contextmanager
def _at(path: Path, place: tuple[str, int]) -> Iterator[None]:
    key, line = place
    try:
        yield
    except (ShallowerError, TypeError, ValueError) as error:
        raise SettingsError(f"{path}, line {line} ({key}): {why(error)}") from error


class _Reader:
    """One file, whose values are read key by key."""

    def __init__(self, path: Path) -> None:
        import yaml

        self._path, self._yaml = path, yaml
        self._lines: dict[str, int] = {}
        with self._is_yaml():
            self._loader = yaml.SafeLoader(path.read_bytes())
            root = self._loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise SettingsError(f"{path} is no sweep: expected keys, of {', '.join(KEYS)}")
        self._nodes = self._keyed(root, KEYS)
        missing = [key for key in _REQUIRED if key not in self._nodes]
        if missing:
            raise SettingsError(f"{path} names no {', '.join(missing)}: a sweep needs all of "
                                f"{', '.join(_REQUIRED)}")  # fmt: skip
        self._lines |= {key: _line(node) for key, node in self._nodes.items()}

    @contextmanager
    def _is_yaml(self) -> Iterator[None]:
        try:
            yield
        except self._yaml.MarkedYAMLError as error:
            line = 1 + getattr(error.problem_mark, "line", 0)
            raise SettingsError(f"{self._path}, line {line}: {error.problem}") from error
        except (self._yaml.YAMLError, OSError, ValueError, RecursionError) as error:
            words = why(error, self._path)
            raise SettingsError(f"cannot read the sweep {self._path}: {words}") from error

    def _given(self, node: Any) -> Any:
        """The plain value of a node."""
        with self._is_yaml():
            return self._loader.construct_object(node, deep=True)

    def _keyed(self, node: Any, keys: tuple[str, ...]) -> dict[str, Any]:
        """The values of a mapping by their keys, which are of those named, each once."""
        found: dict[str, Any] = {}
        for key_node, value in node.value:
            key, line = str(key_node.value), _line(key_node)
            if key not in keys:
                near = get_close_matches(key, keys, 1)
                meant = f"did you mean {near[0]}? " if near else ""
                raise SettingsError(
                    f"{self._path}, line {line}: there is no key {key}: {meant}expected of "
                    f"{', '.join(keys)}"
                )
            if key in found:
                raise SettingsError(f"{self._path}, line {line}: the key {key} is there twice")
            found[key] = value
        return found

    def _value(self, key: str, read: Callable[[Any], Any], otherwise: Any = None) -> Any:
        """Read the value of a key; an error names its line."""
        if key not in self._nodes:
            return otherwise
        with _at(self._path, (key, self._lines[key])):
            return read(self._given(self._nodes[key]))

    def read(self) -> SweepFile:
        """The whole file."""
        loading = {key: self._setting(_loaded, key) for key in _LOADING}
        loading = {key: value for key, value in loading.items() if value is not None}
        models = self._named(
            "models", _OF_MODEL, lambda place, own: _loaded(place, **loading | own)
        )
        texts = self._named("texts", _OF_TEXTS, lambda place, _: place)
        given = {key: self._setting(CompareSettings, key) for key in ("criteria", "n", *_COMMON)}
        given = {key: value for key, value in given.items() if value is not None}
        return SweepFile(
            path=self._path,
            models=models,
            texts=texts,
            eval_texts=self._value("eval_texts", _text),
            settings=CompareSettings(**given),
            states=self._states,
            healing=self._healing({key: given[key] for key in _COMMON if key in given}),
            losses=self._value("losses", _losses, (0.05, 0.1, 0.2, 0.5)),
            lines=self._lines,
        )

    def _setting(self, kind: Any, key: str, **beside: Any) -> Any:
        """A setting that its own value has checked; None where it is not in the file."""
        return self._value(key, lambda value: getattr(kind(**{key: value}, **beside), key))

    @cached_property
    def _states(self) -> tuple[State, ...]:
        return self._setting(CurveSettings, "states") or ("cut", "patched")

    def _healing(self, common: Mapping[str, Any]) -> CurveSettings | None:
        states = self._states
        steps = self._value("heal_steps", lambda value: _healed(value, states))
        if "healed" not in states:
            return None
        return CurveSettings(states=("healed",), heal_steps=steps, **common)

    def _named(
        self, key: str, keys: tuple[str, ...], make: Callable[[str, dict[str, Any]], Any]
    ) -> dict[str, Any]:
        """Models or texts, one or a list, by their names."""
        node, found = self._nodes[key], {}
        for item in node.value if isinstance(node, self._yaml.SequenceNode) else [node]:
            if isinstance(item, self._yaml.MappingNode):
                given = {one: self._given(of) for one, of in self._keyed(item, keys).items()}
            else:
                given = {keys[0]: self._given(item)}
            with _at(self._path, (key, _line(item))):
                place = _text(given.pop(keys[0], None))
                short = Path(place).stem if keys is _OF_TEXTS else Path(place).name
                name = _text(given.pop("name", short or place))
                if name in found:
                    raise ValueError(f"two are called {name}: give one another name (name: …)")
                found[name] = make(place, given)
            self._lines[f"{key}: {name}"] = _line(item)
        if not found:
            raise SettingsError(f"{self._path}, line {_line(node)} ({key}): expected one or more")
        return found


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _loaded(place: str = "model", **options: Any) -> ModelSource:
    """A model to load, whose options are of the types that they should be."""
    checked: dict[str, Any] = {key: of_type(_LOADING[key], value) for key, value in options.items()}
    return ModelSource(place, **checked)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"expected a name or a place, got {value!r}")
    return value


def _losses(value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    for one in values or [None]:
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 < one < math.inf:
            raise ValueError(f"expected nats a token above 0, as [0.1, 0.2], got {one!r}")
    return tuple(sorted({float(one) for one in values}))


def _healed(steps: Any, states: tuple[State, ...]) -> int | None:
    """The steps of a healing, of a sweep that has one."""
    return CurveSettings(heal_steps=steps, states=states).heal_steps
