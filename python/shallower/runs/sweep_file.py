"""The file of a sweep: YAML with a schema; an error names the file and the key."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import SettingsError, ShallowerError, why
from ..models.source import ModelSource
from ..values.options import options_of
from ..values.schema import of_type
from ..values.settings import CompareSettings, CurveSettings, State, StudySettings

_LOADING: dict[str, type] = {"dtype": str, "device_map": str, "trust_remote_code": bool}
"""How models are loaded: keys of the file, and of a single model."""

_COMMON = (*options_of(StudySettings),)
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
        eval_texts: the place of the test texts.
        settings: of every comparison.
        healing: of the curves of healed cuts, without strategies and sizes; None without
            ``healed`` among the states.
        states: in which cuts are looked at.
        losses: nats a token above the whole model, at which the share of layers is told.
    """

    path: Path
    models: Mapping[str, ModelSource]
    texts: Mapping[str, str]
    eval_texts: str
    settings: CompareSettings
    healing: CurveSettings | None
    states: tuple[State, ...]
    losses: tuple[float, ...]

    @contextmanager
    def at(self, key: str) -> Iterator[None]:
        """Name the file and a key of it in errors of the body."""
        with _at(self.path, key):
            yield

    def healed(self, strategies: Sequence[str], *n: int) -> CurveSettings:
        """The settings of a curve of healed cuts."""
        assert self.healing is not None
        return replace(self.healing, strategies=tuple(strategies), n=n)


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep's file, and nothing that it names.

    SettingsError if it is unreadable, no YAML, or has wrong keys or values.
    """
    return _Reader(path).read()


@contextmanager
def _at(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except (ShallowerError, TypeError, ValueError) as error:
        raise SettingsError(f"{path} ({key}): {why(error)}") from error


def _load(path: Path) -> Any:
    """The plain values of a file; SettingsError where it is no YAML."""
    import yaml

    class Once(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that is there twice, of which YAML takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise SettingsError(f"{path}: the key {key} is there twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_bytes(), Once)  # a SafeLoader
    except yaml.MarkedYAMLError as error:  # no key can be named
        line = 1 + getattr(error.problem_mark, "line", 0)
        raise SettingsError(f"{path}, line {line}: {error.problem}") from error
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"cannot read the sweep {path}: {why(error, path)}") from error


class _Reader:
    """One file, whose values are read key by key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        found = _load(path)
        if not isinstance(found, dict):
            raise SettingsError(f"{path} is no sweep: expected keys, of {', '.join(KEYS)}")
        self._check(found, KEYS)
        self._given = found
        missing = [key for key in _REQUIRED if key not in found]
        if missing:
            raise SettingsError(f"{path} names no {', '.join(missing)}: a sweep needs all of "
                                f"{', '.join(_REQUIRED)}")  # fmt: skip

    def _check(self, given: Mapping[Any, Any], keys: tuple[str, ...]) -> None:
        """Refuse a key that is none of those named."""
        for key in map(str, given):
            if key not in keys:
                near = get_close_matches(key, keys, 1)
                meant = f"did you mean {near[0]}? " if near else ""
                raise SettingsError(
                    f"{self._path}: there is no key {key}: {meant}expected of {', '.join(keys)}"
                )

    def _value(self, key: str, read: Callable[[Any], Any], otherwise: Any = None) -> Any:
        """Read the value of a key; an error names it."""
        if key not in self._given:
            return otherwise
        with _at(self._path, key):
            return read(self._given[key])

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
        items, found = self._given[key], {}
        for item in items if isinstance(items, list) else [items]:
            given = dict(item) if isinstance(item, dict) else {keys[0]: item}
            self._check(given, keys)
            with _at(self._path, key):
                place = _text(given.pop(keys[0], None))
                short = Path(place).stem if keys is _OF_TEXTS else Path(place).name
                name = _text(given.pop("name", short or place))
                if name in found:
                    raise ValueError(f"two are called {name}: give one another name (name: …)")
                found[name] = make(place, given)
        if not found:
            raise SettingsError(f"{self._path} ({key}): expected one or more")
        return found


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
