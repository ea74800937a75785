"""Contents: what a scan holds, and how scans are merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._core import Cka, Sums
from ..errors import MetricError, ScanError
from ..values.identity import ModelIdentity, TextsIdentity
from ..values.plan import NAMED_REJECTIONS, Rejection
from ..values.positions import Positions

Samples = Mapping[str, NDArray[np.float32]]
"""For each metric the sums over single sequences, (sequences, L(L+1)/2)."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Contents of a scan.

    Attributes:
        sums: the exact sums of every metric.
        rejections: the first of the samples that were left out, and why; no more than
            ``NAMED_REJECTIONS`` are kept.
        model: the model scanned, if a model was.
        texts: the texts behind it.
        samples: the values of single samples, if they are kept.
        cka: the sums for CKA, if it was asked for.
        positions: which tokens of the texts were compared, if that is known.
    """

    sums: Sums
    rejections: tuple[Rejection, ...] = ()
    model: ModelIdentity | None = None
    texts: tuple[TextsIdentity, ...] = ()
    samples: Samples | None = None
    cka: Cka | None = None
    positions: Positions | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rejections", tuple(self.rejections[:NAMED_REJECTIONS]))


def check_metrics(metrics: Sequence[str]) -> list[str]:
    """Check the names of metrics.

    Args:
        metrics: the names.

    Returns:
        The names as a list.

    Raises:
        MetricError: a single string, an unknown metric, none, or one named twice.
    """
    if isinstance(metrics, str):
        raise MetricError(f"metrics must be a sequence of names, got the string {metrics!r}")
    return Sums(2, list(metrics)).metrics


def merged(parts: Sequence[Contents]) -> Contents:
    """Merge the contents of several scans.

    Args:
        parts: of the same model, metrics and positions.

    Returns:
        All of their samples, with the same bits in whatever order.

    Raises:
        ScanError: there is none, or they differ in layers, metrics, model or positions.
        StatesError: together they hold more than 2**31 samples.
    """
    if not parts:
        raise ScanError("there is no scan to merge")
    first = parts[0]
    sums = Sums(first.sums.num_states, first.sums.metrics)
    for part in parts:
        if (part.model and part.model.fingerprint) != (first.model and first.model.fingerprint):
            raise ScanError(
                f"cannot merge scans of different models: {first.model} and {part.model}"
            )
        if part.positions != first.positions:
            raise ScanError(
                f"cannot merge scans of different positions: {first.positions} and {part.positions}"
            )
        sums.merge(part.sums)
    return Contents(
        sums,
        tuple(rejection for part in parts for rejection in part.rejections),
        first.model,
        tuple(texts for part in parts for texts in part.texts),
        joined([part.samples for part in parts]),
        _added(sums.num_states, [part.cka for part in parts]),
        first.positions,
    )


def joined(parts: Sequence[Samples | None]) -> Samples | None:
    """Join the samples of several parts.

    Args:
        parts: the samples of each.

    Returns:
        All of them; None unless all parts have them.
    """
    kept = [part for part in parts if part is not None]
    if len(kept) < len(parts):
        return None
    return {metric: np.concatenate([part[metric] for part in kept]) for metric in kept[0]}


def _added(num_states: int, parts: Sequence[Cka | None]) -> Cka | None:
    """The sums of all parts for CKA; none, unless all have them."""
    held = [part for part in parts if part is not None]
    if len(held) < len(parts):
        return None
    total = Cka(num_states, held[0].batch_size)
    for part in held:
        total.merge(part)
    return total
