"""The share of its layers that a model can lose at a loss, by the best cut of every size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..settings.studies import State
from ..values.schema import alike, estimated, flat
from .scores import Estimate

LOSSES = (0.05, 0.1, 0.2, 0.5)
"""Nats a token above the whole model at which shares are given; the headline is of the second."""


@dataclass(frozen=True, slots=True)
class BestCut:
    """The cut of least loss of one size and state, of all criteria."""

    model: str  # name of the model
    state: State
    share: float  # of the layers that go
    lost: Estimate  # nats a token above the whole model, paired
    dropped: tuple[int, ...]
    criterion: str  # the criterion that chose the layers

    def to_json(self) -> dict[str, Any]:
        """Give the cut as plain JSON values."""
        return flat(self, _COLUMNS)


_COLUMNS = {
    **alike("model", "state", "share"),
    **estimated("lost", stderr="stderr"),
    **alike("dropped", "criterion"),
}


@dataclass(frozen=True, slots=True)
class Borne:
    """The share of its layers that a model can lose at a loss."""

    model: str  # name of the model
    state: State
    loss: float  # nats a token above the whole model
    share: float  # at which the line through the best cuts of all sizes first exceeds `loss`
    low: float  # the same of losses that are one standard error higher
    high: float  # the same of losses that are one standard error lower
    most: float  # the largest share that was measured: a lower bound where `share` is this
    num_layers: int  # of the model, of which whole ones alone can go

    @property
    def stderr(self) -> float:
        """Half of what lies between ``low`` and ``high``; NaN where the line ends before."""
        return math.nan if self.high >= self.most else (self.high - self.low) / 2

    def __str__(self) -> str:
        def written(share: float) -> str:
            return f"{'≥ ' if share >= self.most else ''}{100 * share:.1f}"

        whole = math.floor(self.share * self.num_layers + 1e-9)
        if not whole:
            return f"less than 1 of {self.num_layers} layers"
        share = f"{written(self.share)} %"
        if self.low < self.most:
            share += f" ({100 * self.low:.1f} to {written(self.high)})"
        return f"{share}, {whole} of {self.num_layers} layers"


def share_borne(cuts: Sequence[BestCut], loss: float, errors: float = 0.0) -> float:
    """Find the share at which the line through (0, 0) and cuts, by size, first exceeds a loss.

    ``errors`` standard errors are added to each cut's loss. A line that stays below it gives the
    largest share.
    """
    before, below = 0.0, 0.0
    for cut in cuts:
        stderr = cut.lost.stderr if math.isfinite(cut.lost.stderr) else 0.0
        lost = cut.lost.mean + errors * stderr
        if lost > loss:
            return before + (loss - below) / (lost - below) * (cut.share - before)
        before, below = cut.share, lost
    return before


def borne(cuts: Sequence[BestCut]) -> list[Borne]:
    """Give the share of its layers that a model bears at every loss, by cuts in one state."""
    return [
        Borne(
            cuts[0].model,
            cuts[0].state,
            loss,
            share_borne(cuts, loss),
            share_borne(cuts, loss, 1.0),
            share_borne(cuts, loss, -1.0),
            cuts[-1].share,
            round(len(cuts[-1].dropped) / cuts[-1].share),
        )
        for loss in LOSSES
    ]
