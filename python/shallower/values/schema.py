"""Values read from JSON, checked against the types that they should have."""

import math
from dataclasses import asdict, fields
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def of_type(expected: type[T], value: Any) -> T:
    """A value from a file, if it is of the type that it should be; raises TypeError."""
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise TypeError(f"expected {expected.__name__}, got {value!r}")
    return value


def from_fields(kind: type[T], data: Any) -> T:
    """A flat dataclass of plain types from a file; raises TypeError."""
    for name, expected in get_type_hints(kind).items():
        of_type(expected, of_type(dict, data)[name])
    return kind(**data)


def row_to_json(row: Any) -> dict[str, Any]:
    """A flat dataclass with ``dropped`` layers as plain JSON values; what is not finite is None."""
    return {
        name: finite(value) if isinstance(value, float) else value
        for name, value in {**asdict(row), "dropped": list(row.dropped)}.items()
    }


def row_from_json(kind: type[T], data: Any) -> T:
    """The same read again, None as NaN where a figure must be; raises KeyError, TypeError."""
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    values = {name: of_type(dict, data)[name] for name in names}
    for one in fields(kind):  # type: ignore[arg-type]
        if one.type is float and values[one.name] is None:
            values[one.name] = math.nan
    return kind(**{**values, "dropped": tuple(values["dropped"])})


def finite(value: float | None) -> float | None:
    """Replace NaN and infinity, which JSON has not, by None."""
    return value if value is not None and math.isfinite(value) else None
