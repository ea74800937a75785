"""Scores by item: what a judge says of each text, its mean with error, and paired differences."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .counts import with_error
from .schema import fields_of, finite

TIE = 2.0
"""Standard errors within which a paired difference is called a tie."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean difference of two scores of the same items.

    Attributes:
        mean: the first less the second, in the unit of the scores; NaN where nothing counts.
        stderr: its standard error, from the differences of single items; NaN for one item.
        num_items: items that both have.
    """

    mean: float
    stderr: float
    num_items: int

    @property
    def tied(self) -> bool:
        """Whether the two cannot be told apart: the mean is within two standard errors of 0."""
        return not math.isfinite(self.stderr) or abs(self.mean) <= TIE * self.stderr

    def to_json(self) -> dict[str, Any]:
        """Give ``mean``, ``stderr`` (None where there is none), ``num_items`` and ``tied``."""
        found = {"mean": finite(self.mean), "stderr": finite(self.stderr)}
        return {**found, "num_items": self.num_items, "tied": self.tied}

    @classmethod
    def from_json(cls, data: Any) -> "Difference":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError."""
        return cls(**fields_of(cls, data, nan=("mean", "stderr")))

    def __str__(self) -> str:
        return with_error(self.mean, self.stderr, 3, sign=True)


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A measure by item; lower is better.

    The mean is a ratio of sums over items, and so is its error, as that of a loss:
    ``sqrt(S/(S-1) · sum_i (sum_i - mean·weight_i)²) / sum_i weight_i``.

    Attributes:
        sums: (S,) float64, the sum over each item, as the nats of all tokens of a text; NaN for
            an item that was not looked at.
        weights: (S,) float64, what each item counts, as its predicted tokens.
    """

    sums: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def from_json(cls, data: Any) -> "Scores":
        """Read the lists of ``sums`` and ``weights``; raises KeyError, TypeError, ValueError."""
        scores = cls(**fields_of(cls, data))
        if len(scores.sums) != len(scores.weights):
            raise ValueError(f"{len(scores.sums)} sums of {len(scores.weights)} items")
        return scores

    def __len__(self) -> int:
        """Items that were looked at."""
        return int(np.isfinite(self.sums).sum())

    @property
    def complete(self) -> bool:
        """Whether all items were looked at."""
        return len(self) == len(self.sums)

    @property
    def mean(self) -> float:
        """The mean over what was looked at; NaN where that is nothing."""
        return _ratio(self.sums, self.weights)[0]

    @property
    def stderr(self) -> float:
        """The standard error of the mean over items; NaN for a single one."""
        return _ratio(self.sums, self.weights)[1]

    def minus(self, other: "Scores") -> Difference:
        """Compare with scores of the same items, paired.

        Where the weights differ the error is that of the difference of two ratios, to first order.
        """
        difference = self.sums - other.sums
        count = int(np.isfinite(difference).sum())
        if np.array_equal(self.weights, other.weights):
            return Difference(*_ratio(difference, self.weights), count)
        there = np.isfinite(difference)
        parts, means = [], []
        for one in (self, other):
            sums, weights = one.sums[there], one.weights[there]
            total = math.fsum(weights)
            if not total:
                return Difference(math.nan, math.nan, count)
            means.append(_ratio(sums, weights)[0])
            parts.append((sums - means[-1] * weights) / total)
        squares = math.fsum((parts[0] - parts[1]) ** 2)
        stderr = math.sqrt(squares * count / (count - 1)) if count > 1 else math.nan
        return Difference(means[0] - means[1], stderr, count)

    def estimated_by(self, whole: "Scores") -> tuple[float, float]:
        """Estimate the mean over all items from some, by the scores of all by something else.

        How hard those are that were not looked at is known from the other scores, of the same
        weights: the difference estimator (Cochran, Sampling Techniques, 1977, section 7.2), the
        mean of ``whole`` and the paired difference to it together, and its standard error.
        """
        if self.complete:
            return self.mean, self.stderr
        less = self.minus(whole)
        there = np.isfinite(self.sums)
        parts = (whole.sums - whole.mean * self.weights) / math.fsum(self.weights)
        apart = self.sums[there] - whole.sums[there] - less.mean * self.weights[there]
        parts[there] += apart / math.fsum(self.weights[there])
        size = len(parts)
        return whole.mean + less.mean, math.sqrt(math.fsum(parts**2) * size / (size - 1))


def _ratio(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """The ratio of two sums over the items that are there, and its standard error."""
    there = np.isfinite(sums)
    sums, weights = sums[there], weights[there]
    total, size = math.fsum(weights), len(sums)
    if not size or not total:
        return math.nan, math.nan
    mean = math.fsum(sums) / total
    if size == 1:
        return mean, math.nan
    squares = math.fsum((sums - mean * weights) ** 2)
    return mean, math.sqrt(squares * size / (size - 1)) / total
