"""Counts added up; how numbers are printed: a count with its noun, a figure with its error."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping


def summed(found: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add counts up by their names."""
    total: Counter[str] = Counter()
    for one in found:
        total.update(one)
    return dict(total)


def counted(count: int, noun: str, many: str | None = None) -> str:
    """``1 layer``, ``4 layers``, ``1,024 tokens``; ``2 passes`` by the word for many."""
    return f"{count:,} {noun if count == 1 else many or f'{noun}s'}"


def with_error(
    value: float | None, stderr: float | None, digits: int = 4, *, sign: bool = False
) -> str:
    """``0.1234 ± 0.0012``; without the error where there is none, ``–`` where there is no value."""
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''}z.{digits}f}"  # no zero has a minus
    return text if stderr is None or not math.isfinite(stderr) else f"{text} ± {stderr:.{digits}f}"
