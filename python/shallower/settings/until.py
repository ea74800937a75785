"""Until: how sure a scan has to be of its best blocks before it stops, and when it was."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

from ..errors import MetricError, PositionsError, SettingsError
from ..values.counts import counted
from ..values.layers import check_sizes
from ..values.positions import Positions

DEFAULT_SIZES = 1, 2, 4, 8

DEFAULT_TOLERANCE = 0.005

BOUNDED = ("angular", "cosine")
"""Metrics with a bounded range, whose mean a few texts cannot turn over."""


@dataclass(frozen=True, slots=True)
class Until:
    """A scan stops when no best block is worse than the best there is by more than a tolerance.

    Attributes:
        confidence: the probability that this is so of all sizes together, between 0 and 1.
        tolerance: what a best block may cost more than the best there is, at least 0 and below 1,
            in the unit of the metric.
        sizes: the block sizes to be sure of; by default 1, 2, 4 and 8, as far as the model has
            them.
        exact: bets instead of asymptotics: the probability holds for any number of texts, of
            which more are needed.

    Raises:
        SettingsError: a number that is out of range.
    """

    confidence: float
    tolerance: float = DEFAULT_TOLERANCE
    sizes: tuple[int, ...] = ()
    exact: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.confidence, Real) or not 0 < self.confidence < 1:
            never = ", which no number of texts reaches" if self.confidence == 1 else ""
            raise SettingsError(
                f"until = {self.confidence!r}{never}: expected a probability between 0 and 1, such "
                f"as 0.99 (--until)"
            )
        if not isinstance(self.tolerance, Real) or not 0 <= self.tolerance < 1:
            raise SettingsError(
                f"tolerance = {self.tolerance!r}: expected a distance from 0 on and below 1, such "
                f"as 0.005 (--tolerance)"
            )

    def of(self, num_layers: int) -> "Until":
        """Name the sizes for a model; LayersError if it cannot lose one of them."""
        named = self.sizes or [n for n in DEFAULT_SIZES if n < max(num_layers, 2)]
        check_sizes(named, num_layers)
        return replace(self, sizes=tuple(sorted({*named})))

    def check(self, metric: str | None, positions: Positions) -> None:
        """Refuse a deciding metric without bounds, and bets on several tokens of a text.

        MetricError, PositionsError.
        """
        if metric not in BOUNDED:
            raise MetricError(
                f"no scan by {metric or 'norm_ratio'} stops when it is sure (--until), as its "
                f"values have no bounds: measure angular, or cosine first (--metrics)"
            )
        if self.exact and not positions.one_a_text:
            raise PositionsError(
                f"bets (--exact) are on one token of a text, not on the positions {positions}: "
                f"leave out one of them"
            )

    def __str__(self) -> str:
        sizes = f" for n = {', '.join(map(str, self.sizes))}" if self.sizes else ""
        bets = ", by bets" if self.exact else ""
        return f"sure by {self.confidence:g} within {self.tolerance:g}{sizes}{bets}"


@dataclass(frozen=True, slots=True)
class Settled:
    """When a scan was sure of the best block of each size."""

    until: Until  # the request, its sizes named
    texts: tuple[int | None, ...]  # by size: texts until it was sure; None: not yet

    @property
    def by_size(self) -> dict[int, int | None]:
        """By block size the texts after which the scan was sure of it; None where it is not."""
        return dict(zip(self.until.sizes, self.texts, strict=True))

    @property
    def all(self) -> bool:
        """True if no size is open."""
        return None not in self.texts

    def seen(self, sure: Sequence[bool], num_texts: int) -> "Settled":
        """Note which sizes are sure after so many texts; one that is no longer is open again."""
        texts = tuple(
            (before or num_texts) if is_sure else None
            for before, is_sure in zip(self.texts, sure, strict=True)
        )
        return replace(self, texts=texts)

    def to_json(self) -> dict[str, Any]:
        """Give the fields as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        said = [
            f"n = {n} after {counted(texts, 'text')}"
            for n, texts in self.by_size.items()
            if texts is not None
        ]
        still = [str(n) for n, texts in self.by_size.items() if texts is None]
        said += [f"open: n = {', '.join(still)}"] if still else []
        return f"{replace(self.until, sizes=())}: {'; '.join(said)}"
