"""Target: how shallow a model is to become."""

import math
import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from ..errors import LayersError
from ..values.counts import counted
from ..values.estimates import format_size
from ..values.layers import check_size, layer_count

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", re.IGNORECASE)
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*x?", re.IGNORECASE)
_OPTIONS = {
    "n": "n",
    "fraction": "fraction",
    "params": "params",
    "max_loss": "max-loss",
    "latency": "target-latency",
    "memory": "target-memory",
}
"""The measures, with the options of the command line."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str) -> int:
    """Read a number of parameters of at least 1, as ``100M`` or ``6.7B``; raises LayersError."""
    found = _COUNT.fullmatch(text.strip())
    count = round(Decimal(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if count < 1:
        raise LayersError(
            f"{text!r} is no number of parameters: expected one as 100M or 6.7B (params, --params)"
        )
    return count


def parse_share(text: str) -> float:
    """Read a share, as ``0.8x`` or ``0.8``; raises LayersError."""
    found = _SHARE.fullmatch(text.strip())
    if found is None:
        raise LayersError(
            f"{text!r} is no share: expected one as 0.8x (target_latency, --target-latency)"
        )
    return float(found[1])


@dataclass(frozen=True, slots=True)
class Target:
    """How many layers are to go: by one of six measures; by none, the knee of the curve.

    The curve is of what verified cuts lose more than the whole model: loss, or divergence.
    """

    n: int | None = None
    fraction: float | None = None  # at least this share of all layers, above 0 and below 1
    params: int | None = None  # as many as it takes to leave at most so many parameters
    max_loss: float | None = None  # nats a token above the whole model, after the patch
    latency: float | None = None  # share of the whole model's time of a token, above 0, below 1
    memory: int | None = None  # bytes of the weights and of the cache of one text at most
    device: str | None = None  # of the forecast; None for the GPU here if known, else an A100
    context: int = 2048  # tokens of a text, of `latency` and `memory`

    def __post_init__(self) -> None:
        measures = {name: getattr(self, name) for name in _OPTIONS}
        given = {name: value for name, value in measures.items() if value is not None}
        if len(given) > 1:
            raise LayersError(
                f"{' and '.join(given)} are given: expected one of {', '.join(_OPTIONS)}, or none "
                f"({', '.join(f'--{option}' for option in _OPTIONS.values())})"
            )
        for name, value in given.items():
            self._check(name, value)
        self._check("context", self.context)
        if self.device is not None and self.latency is None:
            raise LayersError(
                f"device = {self.device!r} without a latency: it is what a latency is forecast for "
                f"(latency, --target-latency)"
            )

    def _check(self, name: str, value: Any) -> None:
        whole = name in ("n", "params", "memory", "context")
        number = isinstance(value, int) or (isinstance(value, float) and not whole)
        option = f"({name}, --{_OPTIONS.get(name, name)})"
        if (
            isinstance(value, bool)
            or not number
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            kind = "a whole number" if whole else "a number"
            raise LayersError(f"{name} = {value!r}: expected {kind} {option}")
        if name in ("fraction", "latency") and not 0 < value < 1:
            raise LayersError(f"{name} = {value}: expected a share above 0 and below 1 {option}")
        if whole and value < 1:
            raise LayersError(f"{name} = {value}: expected at least 1 {option}")
        if name == "max_loss" and value <= 0:
            raise LayersError(f"max_loss = {value}: expected nats a token above 0 {option}")

    def size(self, num_layers: int) -> int | None:
        """Give the number of layers, of L, where it follows from theirs alone; else None.

        It is ``n``, or the least number that is at least ``fraction`` of L.
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
        """Give the fields as plain JSON values, None for those that are not given."""
        return asdict(self)

    @property
    def is_none(self) -> bool:
        """Whether no measure is given."""
        return all(getattr(self, name) is None for name in _OPTIONS)

    def __str__(self) -> str:
        if self.n is not None:
            return f"{layer_count(self.n)} less"
        if self.fraction is not None:
            return f"{100 * self.fraction:g} % of the layers less"
        if self.params is not None:
            return f"at most {self.params:,} parameters"
        if self.max_loss is not None:
            return f"at most {self.max_loss:g} nats a token more"
        if self.latency is not None:
            where = f" on {self.device}" if self.device else ""
            left = f"a token in at most {self.latency:g} of the time"
            return f"{left}, as forecast{where} at {counted(self.context, 'token')}"
        if self.memory is not None:
            size = format_size(self.memory)
            return f"at most {size} of weights and cache, at {counted(self.context, 'token')}"
        return "the knee of the curve"
