"""Wish: how shallow a model is to become, in the words of whoever asks."""

import math
import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from ..errors import LayersError
from .layers import check_size

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str) -> int:
    """Read a number of parameters, as ``100M`` or ``6.7B``.

    Args:
        text: a number, with K, M, B or T behind it or without.

    Returns:
        The number, at least 1.

    Raises:
        LayersError: it is none.
    """
    found = _COUNT.fullmatch(text.strip())
    count = round(Decimal(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if count < 1:
        raise LayersError(
            f"{text!r} is no number of parameters: expected one as 100M or 6.7B (params, --params)"
        )
    return count


@dataclass(frozen=True, slots=True)
class Wish:
    """How many layers are to go: by one of four measures; by none, as many as cost little.

    Attributes:
        n: so many layers.
        fraction: at least this share of all layers, above 0 and below 1.
        params: as many as it takes to leave at most so many parameters.
        max_loss: as many as can go for at most so many nats a token above the whole model, after
            the patch.

    Raises:
        LayersError: more than one is given, or one that cannot be.
    """

    n: int | None = None
    fraction: float | None = None
    params: int | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) > 1:
            raise LayersError(
                f"{' and '.join(given)} are given: expected one of n, fraction, params and "
                f"max_loss, or none (--n, --fraction, --params, --max-loss)"
            )
        for name, value in given.items():
            self._check(name, value)

    def _check(self, name: str, value: Any) -> None:
        whole = name in ("n", "params")
        number = isinstance(value, int) or (isinstance(value, float) and not whole)
        option = f"({name}, --{name.replace('_', '-')})"
        if (
            isinstance(value, bool)
            or not number
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            kind = "a whole number" if whole else "a number"
            raise LayersError(f"{name} = {value!r}: expected {kind} {option}")
        if name == "fraction" and not 0 < value < 1:
            raise LayersError(f"fraction = {value}: expected a share above 0 and below 1 {option}")
        if whole and value < 1:
            raise LayersError(f"{name} = {value}: expected at least 1 {option}")
        if name == "max_loss" and value <= 0:
            raise LayersError(f"max_loss = {value}: expected nats a token above 0 {option}")

    def size(self, num_layers: int) -> int | None:
        """Give the number of layers, where it follows from theirs alone.

        Args:
            num_layers: layers of the model, L.

        Returns:
            ``n``, or the least number that is at least ``fraction`` of L; else None.

        Raises:
            LayersError: the model cannot lose so many.
        """
        if self.n is not None:
            check_size(num_layers, self.n)
            return self.n
        if self.fraction is None:
            return None
        n = max(1, math.ceil(self.fraction * num_layers - 1e-9))
        if n == num_layers:
            raise LayersError(
                f"fraction = {self.fraction}: these are all {num_layers} layers, and one must "
                f"stay (fraction, --fraction)"
            )
        return n

    def to_json(self) -> dict[str, Any]:
        """Give the wish as plain JSON values: its fields, None for those that are not given."""
        return asdict(self)

    def __str__(self) -> str:
        if self.n is not None:
            return f"{self.n} layers less"
        if self.fraction is not None:
            return f"{100 * self.fraction:g} % of the layers less"
        if self.params is not None:
            return f"at most {self.params:,} parameters"
        if self.max_loss is not None:
            return f"at most {self.max_loss:g} nats a token more"
        return "as many layers less as cost little each"
