"""Settling: whether more texts could still make another block the best by more than a tolerance.

A sequential model confidence set (2404.18678) for each block size: candidates are the K = L-n+1
starts, and an observation is a text's distances. The leader is the start of the least sum so far.
It is settled as soon as it is shown to exceed no rival by more than the tolerance. That is wrong
only where the best start of all is such a rival: K-1 pairs, which share the error, whoever leads
when. Texts of a window are sorted by length, so whole windows are judged, by sums that their order
does not change. docs/derivations.md has the formulas.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..errors import ScanError
from ..settings.until import Settled, Until

JUDGED = 128
"""Texts from one judgement to the next, whatever the batch: each is a chance to be wrong."""

BURN_IN = 64
"""Texts before which no limit theorem is trusted."""

TARGET = 256
"""Texts at which the asymptotic bounds are the narrowest."""

NUM_BETS = 6

RANGE = {"angular": 1.0, "cosine": 2.0}
"""The most by which two distances can differ."""


class Rule(ABC):
    """What shows that the leader of K candidates exceeds none by more than a tolerance.

    Attributes:
        count: texts so far.
        sums: (K,) of their distances.
    """

    def __init__(self, num_candidates: int) -> None:
        self.count = 0
        self.sums = np.zeros(num_candidates)

    def take(self, values: NDArray[np.float64]) -> None:
        """Add (T, K) distances, text by text: any division into calls gives the same bits."""
        for row in values:
            self.count += 1
            self.sums += row
            self._add(row[:, None] - row)

    def is_settled(self, tokens: float) -> bool:
        """Whether the leader so far is shown, of sums over so many tokens a text on average."""
        leader = int(self.sums.argmin())
        return bool(np.delete(self.shown(leader, tokens), leader).all())

    @abstractmethod
    def _add(self, excess: NDArray[np.float64]) -> None:
        """Add the (K, K) differences of a text, of rows less columns."""

    @abstractmethod
    def shown(self, leader: int, tokens: float) -> NDArray[np.bool_]:
        """Which (K,) candidates one is shown to exceed by no more than the tolerance."""


class Asymptotic(Rule):
    """Asymptotic confidence sequences of paired differences (2103.06476, one-sided)."""

    def __init__(self, num_candidates: int, error: float, tolerance: float) -> None:
        super().__init__(num_candidates)
        self._error, self._tolerance = error / (num_candidates - 1), tolerance
        self._squares = np.zeros((num_candidates, num_candidates))

    def _add(self, excess: NDArray[np.float64]) -> None:
        self._squares += np.square(excess)

    def shown(self, leader: int, tokens: float) -> NDArray[np.bool_]:
        """Compare the upper bound of each mean excess with the tolerance."""
        if self.count < BURN_IN:
            return np.zeros(len(self.sums), np.bool_)
        mean = (self.sums[leader] - self.sums) / self.count
        spread = np.maximum(self._squares[leader] / self.count - mean**2, 0)
        deviation = np.sqrt(spread * self.count / (self.count - 1))
        bound: NDArray[np.float64] = mean + deviation * width(self.count, self._error)
        return bound <= self._tolerance * tokens


def width(count: int, error: float) -> float:
    """The distance of a one-sided bound in standard deviations, narrowest around ``TARGET`` texts.

    Of a half-normal mixture, ρ by 2103.06476's rule.
    """
    squared = (-2 * math.log(error) + math.log(1 - 2 * math.log(error))) / TARGET
    grown = count * squared + 1
    return math.sqrt(2 * grown * math.log1p(math.sqrt(grown) / (2 * error)) / squared) / count


class Betting(Rule):
    """Bets against an excess beyond the tolerance (2010.09686): exact for bounded distances.

    A bet is a fixed share of the most that cannot ruin, half of it from one to the next, as is
    the money that it begins with. Where one exceeds the other by the tolerance or more, the
    wealth against that is a supermartingale. ``most`` is what distances can differ by.
    """

    def __init__(
        self, num_candidates: int, error: float, tolerance: float, *, most: float = 1.0
    ) -> None:
        super().__init__(num_candidates)
        halves = 0.5 ** np.arange(NUM_BETS)
        money = [*halves[1:], halves[-1]]  # 1 in all
        self._tolerance = tolerance
        self._bets = (halves / (most - tolerance))[:, None, None]
        self._needed = math.log((num_candidates - 1) / error)
        each = np.ones((num_candidates, num_candidates))
        self._wealth = np.log(np.multiply.outer(money, each))

    def _add(self, excess: NDArray[np.float64]) -> None:
        with np.errstate(divide="ignore"):  # where all is lost
            won = np.maximum(self._bets * (self._tolerance - excess), -1)
            self._wealth += np.log1p(won)

    def shown(self, leader: int, tokens: float) -> NDArray[np.bool_]:
        """Compare the wealth of all bets against each excess with what is needed."""
        assert tokens == 1
        wealth: NDArray[np.float64] = np.logaddexp.reduce(self._wealth[:, leader])
        return wealth >= self._needed


class Settling:
    """The rules of all sizes that a scan is to be sure of, fed window by window.

    Attributes:
        metric: the metric that decides.
        settled: when which size was.
    """

    def __init__(self, until: Until, num_layers: int, metric: str) -> None:
        self.metric, self.settled = metric, Settled(until, (None,) * len(until.sizes))
        self._sign = -1 if metric == "cosine" else 1
        starts, stops = np.triu_indices(num_layers + 1, 1)
        self._pairs = [np.flatnonzero(stops - starts == n) for n in until.sizes]
        error = (1 - until.confidence) / len(until.sizes)
        self._rules: list[Rule] = [
            Betting(len(pairs), error, until.tolerance, most=RANGE[metric])
            if until.exact
            else Asymptotic(len(pairs), error, until.tolerance)
            for pairs in self._pairs
        ]

    def resume(self, before: Settled | None) -> None:
        """Go on from an interrupted scan, whose samples are to be taken again, but not judged.

        ScanError if it stops otherwise.
        """
        if before is None or before.until != self.settled.until:
            stops = "goes on to the last text" if before is None else f"stops {before.until}"
            raise ScanError(f"it {stops}, not {self.settled.until}")
        self.settled = before

    def take(self, parts: Iterable[NDArray[np.float32]]) -> None:
        """Add parts of samples, (T, L(L+1)/2) values of texts, each a sum over its tokens."""
        for samples in parts:
            for pairs, rule in zip(self._pairs, self._rules, strict=True):
                rule.take(self._sign * samples[:, pairs].astype(np.float64))

    def judge(self, num_texts: int, tokens: float) -> None:
        """Note which sizes are settled after so many texts, of so many tokens on average."""
        sure = [rule.is_settled(tokens) for rule in self._rules]
        self.settled = self.settled.seen(sure, num_texts)
