"""Values as JSON: read by the types of their fields, written field by field, rows as flat columns.

Nothing in a file is believed before. A class with ``from_json`` or ``to_json`` decides itself.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def of_type(expected: type[T], value: Any) -> T:
    """A value from a file, if it is of the type that it should be; raises TypeError."""
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise TypeError(f"expected {expected.__name__}, got {value!r}")
    return value


def read(kind: Any, data: Any) -> Any:
    """A value from a file as a ``kind``; raises TypeError, KeyError, ValueError.

    A dataclass without ``from_json`` must have all of its fields there, and nothing beside them.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, UnionType):
        rest = [one for one in inner if one is not NoneType]
        return None if data is None and len(rest) < len(inner) else read(rest[0], data)
    if origin is Literal:
        if data not in inner:
            raise ValueError(f"{data!r}: expected one of {', '.join(map(str, inner))}")
        return data
    if origin is tuple:
        return tuple(read(inner[0], one) for one in of_type(list, data))
    if getattr(origin, "__name__", "") == "ndarray":
        import numpy as np  # which a command's help does without

        return np.array([read(float, one) for one in of_type(list, data)], np.float64)
    if origin in (dict, Mapping):
        items = of_type(dict, data).items()
        return {of_type(str, name): read(inner[1], one) for name, one in items}
    if kind is float and type(data) is int and abs(data) < 2**63:  # JSON has 1 and 1.0 alike
        return float(data)
    if not is_dataclass(kind):
        return of_type(kind, data)
    return _dataclass(kind, data)


def _dataclass(kind: Any, data: Any) -> Any:
    if hasattr(kind, "from_json"):
        return kind.from_json(data)
    if more := set(of_type(dict, data)) - {one.name for one in fields(kind)}:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(map(str, more)))}")
    return kind(**fields_of(kind, data))


def fields_of(kind: Any, data: Any, nan: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass from a file, whatever lies beside them; raises as :func:`read`.

    ``nan`` names fields in which None stands for NaN, which JSON has not.
    """
    values = of_type(dict, data)
    return {
        name: math.nan if values[name] is None and name in nan else _field(name, of, values[name])
        for name, of in _kinds(kind).items()
    }


def _field(name: str, kind: Any, value: Any) -> Any:
    """A field as :func:`read` gives it; an error names the field."""
    try:
        return read(kind, value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@cache
def _kinds(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind)}


def plain(value: Any, by: str = "to_json") -> Any:
    """A value as JSON has it, by its method or field by field; None for what is not finite."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, list | tuple):
        return [plain(one, by) for one in value]
    if isinstance(value, Mapping):
        return {name: plain(one, by) for name, one in value.items()}
    if hasattr(value, "tolist"):  # of NumPy, in which NaN is a value
        return value.tolist()
    if hasattr(value, by):
        return getattr(value, by)()
    return plain_fields(value, by) if is_dataclass(value) else value


def plain_fields(value: Any, by: str = "to_json") -> dict[str, Any]:
    """The fields of a dataclass as :func:`plain` gives them, which :func:`fields_of` reads."""
    return {one.name: plain(getattr(value, one.name), by) for one in fields(value)}


Columns = dict[str, str]
"""The columns of a row in JSON and CSV, each with the path to its value: ``cut.loss.stderr``."""


def alike(*names: str) -> Columns:
    """Columns with the names of fields."""
    return {name: name for name in names}


def estimated(name: str, path: str = "", stderr: str = "") -> Columns:
    """The columns of an estimate and its standard error, by default ``NAME_stderr``."""
    path = path or name
    return {name: f"{path}.mean", stderr or f"{name}_stderr": f"{path}.stderr"}


def flat(row: Any, columns: Columns) -> dict[str, Any]:
    """The columns of a row as plain JSON values; None for those of a value that is not there."""
    found = {}
    for name, path in columns.items():
        value = row
        for part in path.split("."):
            value = None if value is None else getattr(value, part)
        found[name] = plain(value)
    return found


def fields_of_flat(kind: Any, data: Any, columns: Columns) -> dict[str, Any]:
    """The fields of a row from its columns; the first one decides whether a field is None."""
    tree: Any = {}
    optional = {name for name, of in _kinds(kind).items() if NoneType in get_args(of)}
    for name, path in columns.items():
        *outer, last = path.split(".")
        value, branch = of_type(dict, data)[name], tree
        for part in outer:
            branch = branch.setdefault(part, None if value is None and part in optional else {})
            if branch is None:
                break
        else:
            branch[last] = value
    return fields_of(kind, tree)


def finite(value: float | None) -> float | None:
    """Replace NaN and infinity, which JSON has not, by None."""
    return value if value is not None and math.isfinite(value) else None
