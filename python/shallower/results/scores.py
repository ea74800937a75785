"""Scores by item: what a judge says of each text, its mean with error, and paired differences."""

import math
from dataclasses import dataclass
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from ..values.counts import with_error
from ..values.schema import fields_of, plain_fields

TIE = 2.0
"""Standard errors within which a paired difference is called a tie."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its standard error."""

    mean: float  # in the unit of what was measured; NaN where nothing counts
    stderr: float  # from single items; NaN where there is none, as for one item

    @property
    def tied(self) -> bool:
        """Whether it cannot be told from 0: it is within two standard errors."""
        return not math.isfinite(self.stderr) or abs(self.mean) <= TIE * self.stderr

    @classmethod
    def of(cls, found: "Estimate | Scores") -> "Estimate":
        """Give the mean of scores, or a difference without its number of items."""
        return Estimate(found.mean, found.stderr)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read the fields; None is NaN. Raises KeyError, TypeError."""
        return cls(**fields_of(cls, data, nan=("mean", "stderr")))


UNKNOWN = Estimate(math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class Difference(Estimate):
    """The mean difference of two scores of the same items: the first less the second."""

    num_items: int  # items that both have

    def to_json(self) -> dict[str, Any]:
        """Give ``mean``, ``stderr`` (None where there is none), ``num_items`` and ``tied``."""
        return {**plain_fields(self), "tied": self.tied}

    def __str__(self) -> str:
        return with_error(self.mean, self.stderr, 3, sign=True)


@final
@dataclass(frozen=True, slots=True)
class Standing:
    """What a cut loses in one state, each with its standard error."""

    loss: Estimate  # nats a token
    difference: Estimate  # `loss` less that of the whole model, paired by text
    regret: Estimate = UNKNOWN  # behind the best cut, paired by item; 0 for it; NaN without rival

    @property
    def is_ranked(self) -> bool:
        """Whether it was compared with the others of its size."""
        return math.isfinite(self.regret.mean)

    @property
    def tied(self) -> bool:
        """Whether it was, and cannot be told from the best."""
        return self.is_ranked and self.regret.tied

    @classmethod
    def of(cls, scores: "Scores", whole: "Scores") -> "Standing":
        """That of scores by text beside the whole model's; a loss of some texts is estimated."""
        return cls(scores.estimated_by(whole), Estimate.of(scores.minus(whole)))

    @classmethod
    def from_json(cls, data: Any) -> "Standing":
        """Read the estimates that are known; raises KeyError, TypeError."""
        return cls(**{name: Estimate.from_json(data[name]) for name in {*data} - {"tied"}})


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A measure by item; lower is better.

    The mean is a ratio of sums over items, and so is its error, as that of a loss:
    ``sqrt(S/(S-1) · sum_i (sum_i - mean·weight_i)²) / sum_i weight_i``.
    """

    sums: NDArray[np.float64]  # (S,), as the nats of all tokens of a text; NaN: not judged
    weights: NDArray[np.float64]  # (S,), as the predicted tokens of a text

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

        Where the weights differ, the error is that of the difference of two ratios, to first order.
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

    def recovered(self, cut: "Scores", whole: "Scores") -> Estimate:
        """Estimate the share of what a cut lost that came back, paired; NaN if it lost nothing."""
        lost = cut.sums - whole.sums
        return Estimate.of(Scores(cut.sums - self.sums, lost)) if lost.sum() > 0 else UNKNOWN

    def estimated_by(self, whole: "Scores") -> Estimate:
        """Estimate the mean over all items from some, by other scores of all.

        The difference estimator (Cochran, Sampling Techniques, 1977, section 7.2): the mean of
        ``whole``, of the same weights, and the paired difference to it together, and its standard
        error.
        """
        if self.complete:
            return Estimate.of(self)
        less = self.minus(whole)
        there = np.isfinite(self.sums)
        parts = (whole.sums - whole.mean * self.weights) / math.fsum(self.weights)
        apart = self.sums[there] - whole.sums[there] - less.mean * self.weights[there]
        parts[there] += apart / math.fsum(self.weights[there])
        size = len(parts)
        stderr = math.sqrt(math.fsum(parts**2) * size / (size - 1))
        return Estimate(whole.mean + less.mean, stderr)


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
