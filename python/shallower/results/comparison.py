"""CriteriaComparison: what criteria remove, and what that costs, row by row in each state."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..settings.studies import STATES, State
from ..values.counts import counted
from ..values.identity import title_of
from ..values.layers import ranges
from ..values.provenance import hash_of
from ..values.schema import (
    alike,
    estimated,
    fields_of,
    fields_of_flat,
    flat,
    of_type,
    plain,
    plain_fields,
)
from .loss import Loss
from .scores import Estimate, Scores, Standing
from .speech import Speech
from .task_scores import TaskScores


@dataclass(frozen=True, slots=True)
class Row:
    """A cut that a criterion chose, in one state; losses are on the test set, None is unknown."""

    model: str
    texts: str  # name of the calibration texts, of the criterion and of the patch
    criterion: str
    n: int  # layers that go; of experts those of each layer
    state: State
    dropped: tuple[int, ...]
    standing: Standing | None  # its regret is to the best of its size and state
    tau: float | None  # Kendall's τ-b of the costs of single layers with the true losses
    layers_share: float  # of all layers
    parameters_share: float  # of all parameters
    time_share: float | None = None  # saved share of a token's time, forecast for an A100
    layer_forwards: int = 0  # layers run, times texts, by the choice itself
    choice_seconds: float = 0.0  # wall time here, where what is shared is made once
    seconds: float = 0.0  # wall time of the patch or the healing, and of the measurements
    score: Estimate | None = None  # the judge's, of the bare cut on test items
    accuracy: float | None = None  # of the judge `options`
    failed: str | None = None  # why there is no loss
    experts: str | None = None  # dropped experts, as in `--drop-experts`; None for layers
    tasks: tuple[TaskScores, ...] = ()  # main measures; sampled ones as `gsm8k sampled`
    speech: Speech | None = None

    @property
    def words(self) -> str:
        """What goes, in words: ``[12, 20)``, or how many experts of each layer."""
        if self.experts is None:
            return ranges(self.dropped)
        return f"{counted(self.n, 'expert')} a layer"

    def task(self, name: str) -> TaskScores | None:
        """Find the scores of a task; None where it was not done."""
        return next((scores for scores in self.tasks if scores.task == name), None)

    def to_json(self) -> dict[str, Any]:
        """Give the columns of the row, its tasks and its speech; what is not finite is None."""
        return {**flat(self, COLUMNS), **_measures(self)}

    @classmethod
    def from_json(cls, data: Any) -> "Row":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError, ValueError."""
        return cls(**fields_of_flat(cls, data, {**COLUMNS, **alike("tasks", "speech")}))


COLUMNS = {
    **alike("model", "texts", "criterion", "n", "state", "dropped"),
    **estimated("loss", "standing.loss", "stderr"),
    **estimated("difference", "standing.difference"),
    **estimated("regret", "standing.regret"),
    "tied": "standing.tied",
    **alike("tau", "layers_share", "parameters_share", "time_share"),
    **alike("layer_forwards", "choice_seconds", "seconds"),
    **estimated("score"),
    **alike("accuracy", "failed", "experts"),
}
"""The columns of a row, in JSON and CSV."""


def _measures(found: "Row | ComparedModel") -> dict[str, Any]:
    """The scores on tasks and the speech of a row or a whole model, from which they are read."""
    return {name: plain(getattr(found, name), "to_record") for name in ("tasks", "speech")}


def scan_place(model: str, texts: str) -> str:
    """The place of the scan of a model on calibration texts, below the folder of a comparison."""
    return f"scans/{hash_of([model, texts])[:12]}.safetensors"


@dataclass(frozen=True, slots=True)
class Start:
    """The best start of a block of one size, and how it moves when texts are drawn again."""

    n: int  # layers of the block
    start: int  # l*(n), of the least angular distance
    probability: float | None  # share of resamples in which it is the same; None without samples
    spread: float | None  # standard deviation of the start over resamples, in layers


@dataclass(frozen=True, slots=True)
class ComparedModel:
    """What a comparison says of one model beside its rows."""

    name: str
    num_layers: int
    whole: Loss | None  # on the test set; None by the judge `none`
    single_layers: tuple[float, ...] = ()  # loss without each layer, (L,), nats a token
    chance: float | None = None  # accuracy of a guess, of the judge `options`
    accuracy: float | None = None  # of the whole model
    dtype: str = ""
    parameters: int | None = None
    num_experts: int | None = None  # routed ones of a layer, where experts are compared
    tasks: tuple[TaskScores, ...] = ()
    speech: Speech | None = None  # beside itself
    # By the name of calibration texts; of one of several models or texts, or without a judge.
    starts: Mapping[str, tuple[Start, ...]] = field(default_factory=dict)

    def task(self, name: str) -> TaskScores | None:
        """Find the scores of a task; None where it was not done."""
        return next((scores for scores in self.tasks if scores.task == name), None)

    @property
    def title(self) -> str:
        """The name for tables and figures: of a place on this machine its last part."""
        return title_of(self.name)

    def to_json(self) -> dict[str, Any]:
        """Give the model as plain JSON values."""
        return {**plain_fields(self), **_measures(self)}


@dataclass(frozen=True, slots=True)
class CriteriaComparison:
    """Criteria compared on one or several models.

    Attributes:
        models: the models that were compared, in order.
        rows: every choice, by model, texts, state, criterion and n.
        failures: the models that could not be compared, and why.
        skipped: the criteria that could not choose, and why.
        judge: name of the judge that chose.
        unit: of a score of that judge.
        splits: the number of calibration, selection and test texts.
        max_length: tokens of a text, at most.
        versions: of the packages that made the figures.
        settings: those that are shown beside the figures, as ``patch`` (``full`` or ``quick``) and
            ``patch_tokens``, the tokens that a full patch was fitted on.
        ended: whether all rows that can be are there.
    """

    models: tuple[ComparedModel, ...]
    rows: tuple[Row, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    judge: str = "loss"
    unit: str = "nats a token"
    splits: Mapping[str, int] = field(default_factory=dict)
    max_length: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = True

    @property
    def states(self) -> tuple[State, ...]:
        """The states that were measured, in the order in which a cut comes into them."""
        return tuple(state for state in STATES if any(row.state == state for row in self.rows))

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria, in the order of the rows."""
        return tuple(dict.fromkeys(row.criterion for row in self.rows))

    @classmethod
    def from_json(cls, data: Any) -> "CriteriaComparison":
        """Read what :meth:`to_json` gave; raises ValueError, KeyError, TypeError."""
        if of_type(dict, data).get("format") != "shallower.comparison" or data["version"] != 2:
            raise ValueError("expected format shallower.comparison version 2")
        return cls(**fields_of(cls, data))

    def to_json(self) -> dict[str, Any]:
        """Give ``rows``, ``whole`` (the loss of the first model) and all else by name."""
        whole = self.models[0].whole if self.models else None
        return {
            "format": "shallower.comparison",
            "version": 2,
            "rows": [],  # before the rest
            "whole": whole and {"loss": whole.nats, **whole.to_json()},
            **plain_fields(self),
        }


MeasuredRow = tuple[Row, Scores | None]
"""A row without regret, and the scores that rank it: a bare cut's by the judge, else losses."""


def with_regrets(measured: Sequence[MeasuredRow]) -> Iterator[Row]:
    """Compare every row of one model with the least mean of its size and state, paired."""
    best: dict[tuple[int, State], Scores] = {}
    for row, scores in measured:
        key = row.n, row.state
        if scores is not None and (key not in best or scores.mean < best[key].mean):
            best[key] = scores
    for row, scores in measured:
        if scores is None or row.standing is None:
            yield row
            continue
        regret = Estimate.of(scores.minus(best[row.n, row.state]))
        yield replace(row, standing=replace(row.standing, regret=regret))


LOSSES = (0.05, 0.1, 0.2, 0.5)
"""Nats a token above the whole model at which shares are given; the headline is of the second."""

RankedCut = tuple[Row, Standing]
"""A cut and what it loses, as the best of its size and state, of all criteria."""

CUT_COLUMNS = {
    **alike("model", "state"),
    "share": "layers_share",
    **estimated("lost", "standing.difference", "stderr"),
    **alike("dropped", "criterion"),
}
"""The columns of such a cut, among those of several models."""


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


def share_borne(cuts: Sequence[RankedCut], loss: float, errors: float = 0.0) -> float:
    """Find the share at which the line through (0, 0) and cuts, by size, first exceeds a loss.

    ``errors`` standard errors are added to each cut's loss. A line that stays below it gives the
    largest share.
    """
    before, below = 0.0, 0.0
    for cut, standing in cuts:
        more = standing.difference
        lost = more.mean + errors * (more.stderr if math.isfinite(more.stderr) else 0.0)
        if lost > loss:
            return before + (loss - below) / (lost - below) * (cut.layers_share - before)
        before, below = cut.layers_share, lost
    return before


def borne(cuts: Sequence[RankedCut]) -> list[Borne]:
    """Give the share of its layers that a model bears at every loss, by cuts in one state."""
    last = cuts[-1][0]
    return [
        Borne(
            last.model,
            last.state,
            loss,
            share_borne(cuts, loss),
            share_borne(cuts, loss, 1.0),
            share_borne(cuts, loss, -1.0),
            last.layers_share,
            round(len(last.dropped) / last.layers_share),
        )
        for loss in LOSSES
    ]
