"""Gain: what a cut saves of parameters, bytes, operations and time, as forecast and as measured."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ..errors import ExpertsError
from ..values.experts import DroppedExperts
from ..values.layers import blocks_of
from ..values.plan import Plan
from ..values.schema import fields_of, of_type, plain_fields


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model holds, and what a forward takes; multiply and add are two operations."""

    num_layers: int
    parameters: int  # values of its weights; those that it shares count once
    weight_bytes: int  # of weights and buffers
    kv_bytes_per_token: int  # of one text at this context; layers with a window may add none
    kv_bytes: int  # of the cache of all texts at this context
    prefill_flops: int  # operations of the forward of the context
    prefill_bytes: int  # bytes that it reads and writes
    decode_flops: int  # operations of the forward of one more token of every text
    decode_bytes: int  # bytes that it reads and writes

    @property
    def memory(self) -> int:
        """Bytes of the weights and of the cache at this context."""
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class Forecast:
    """The time of a forward on one device by its roofline, before and after a cut."""

    device: str
    title: str  # a name for people
    source: str  # of its figures
    flops: float  # operations a second at most, in the dtype of the weights
    bandwidth: float  # bytes a second
    memory: int  # bytes
    launch: float  # seconds that every operation takes beside that; 0 where it is not known
    prefill_before: float  # seconds of the forward of the context, all layers
    prefill_after: float
    decode_before: float  # seconds of one more token of every text, all layers
    decode_after: float
    fits_before: bool  # whether its memory holds the weights and the cache, all layers
    fits_after: bool

    @property
    def prefill_ratio(self) -> float:
        """The time of a prefill after the cut, as a share of that before."""
        return self.prefill_after / self.prefill_before

    @property
    def decode_ratio(self) -> float:
        """The time of a token after the cut, as a share of that before."""
        return self.decode_after / self.decode_before


@dataclass(frozen=True, slots=True)
class MeasuredGain:
    """What was measured on this machine, with and without the layers in turns."""

    title: str  # the processor or GPU
    prefill_before: tuple[float, ...]  # seconds of the forward of the context, by repeat
    prefill_after: tuple[float, ...]
    decode_before: tuple[float, ...]  # seconds of one more token of every text, by repeat
    decode_after: tuple[float, ...]
    peak_before: int  # bytes of tensors at most, weights included
    peak_after: int

    @property
    def prefill_ratio(self) -> tuple[float, float, float]:
        """The paired ratios of the prefill, after over before: median, least and greatest."""
        return _spread(self.prefill_before, self.prefill_after)

    @property
    def decode_ratio(self) -> tuple[float, float, float]:
        """The paired ratios of a token, after over before: median, least and greatest."""
        return _spread(self.decode_before, self.decode_after)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values, with medians and ratios beside them."""
        return {
            **plain_fields(self),
            "medians": {name: median(getattr(self, name)) for name in _TIMES},
            "prefill_ratio": list(self.prefill_ratio),
            "decode_ratio": list(self.decode_ratio),
        }

    @classmethod
    def from_json(cls, data: Any) -> "MeasuredGain":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError, ValueError."""
        measured = cls(**fields_of(cls, data))
        times: list[tuple[float, ...]] = [getattr(measured, name) for name in _TIMES]
        if not times[0] or len({len(values) for values in times}) > 1:
            raise ValueError("expected as many times of each kind, one at least")
        if not all(0 < one < math.inf for values in times for one in values):
            raise ValueError("expected times above 0")
        return measured


_TIMES = ("prefill_before", "prefill_after", "decode_before", "decode_after")


def _spread(before: tuple[float, ...], after: tuple[float, ...]) -> tuple[float, float, float]:
    ratios = [late / early for early, late in zip(before, after, strict=True)]
    return median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True, slots=True)
class Gain:
    """The gain of a cut: sizes before and after, forecasts and measurements.

    Attributes:
        model: the name of the model.
        num_layers: its decoder layers, L.
        dropped: the layers that go.
        dtype: of the weights.
        context: tokens of a text before it is continued.
        batch: texts in a forward.
        before: the whole model.
        after: the cut.
        forecasts: for one device or several.
        measured: on this machine, if it was.
        versions: of the packages that made the figures.
        experts: that go of the layers that stay, if any do.
    """

    model: str
    num_layers: int
    dropped: tuple[int, ...]
    dtype: str
    context: int
    batch: int
    before: Sizes
    after: Sizes
    forecasts: tuple[Forecast, ...]
    measured: MeasuredGain | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    experts: DroppedExperts | None = None

    @property
    def words(self) -> str:
        """What goes, in words, as :attr:`Plan.words`."""
        return Plan(self.num_layers, blocks_of(self.dropped), experts=self.experts).words

    def on(self, device: str) -> Forecast:
        """The forecast for a device, as ``a100-80``; KeyError if there is none."""
        for one in self.forecasts:
            if one.device == device:
                return one
        raise KeyError(device)

    def ratios(self) -> dict[str, float]:
        """Every size after the cut as a share of that before; without those that were 0."""
        before, after = asdict(self.before), asdict(self.after)
        return {name: after[name] / value for name, value in before.items() if value}

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the ratios beside them."""
        return {
            "format": "shallower.gain",
            "version": 1,
            "model": self.model,
            "num_layers": self.num_layers,
            "dropped": list(self.dropped),
            "dtype": self.dtype,
            "context": self.context,
            "batch": self.batch,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "ratios": self.ratios(),
            "forecasts": [asdict(one) for one in self.forecasts],
            "measured": self.measured and self.measured.to_json(),
            "versions": dict(self.versions),
            "experts": self.experts and self.experts.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Gain":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError, ValueError."""
        if of_type(dict, data).get("format") != "shallower.gain" or data["version"] != 1:
            raise ValueError("expected a gain of version 1")
        try:
            gain = cls(**fields_of(cls, data))
        except ExpertsError as error:
            raise ValueError(str(error)) from error
        tokens = [time for one in gain.forecasts for time in (one.decode_before, one.decode_after)]
        if not all(0 < time < math.inf for time in tokens):
            raise ValueError("expected times above 0")
        return gain
