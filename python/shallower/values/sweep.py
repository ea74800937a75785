"""Sweep: the jobs of models × texts × criteria × sizes, and which share of layers a model bears."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .commands import command_line
from .schema import alike, estimated, fields_of, flat, of_type
from .scores import Estimate
from .settings import State

JobKind = Literal["compare", "scan", "curve"]
"""The command of a job."""


@dataclass(frozen=True, slots=True)
class SweepJob:
    """A command of a sweep that depends on no other, with a folder of its own.

    Attributes:
        name: of the job, and of its folder below ``jobs``.
        kind: its command.
        model: the name of its model in the sweep.
        texts: the name of its calibration texts in the sweep.
        words: of the command line behind ``shallower``, with places as they were given.
        state: ``waiting``, ``done`` or ``failed``.
        error: the last sentence of one that failed.
        seconds: wall time that it took; None where it was there already.
    """

    name: str
    kind: JobKind
    model: str
    texts: str
    words: tuple[str, ...]
    state: Literal["waiting", "done", "failed"] = "waiting"
    error: str | None = None
    seconds: float | None = None

    @property
    def folder(self) -> str:
        """Its folder, below that of the sweep."""
        return f"jobs/{self.name}"

    @property
    def log(self) -> str:
        """The file of what it prints, below the folder of the sweep."""
        return f"{self.folder}/log.txt"

    @property
    def command(self) -> str:
        """Its command line, for a shell."""
        return command_line(*self.words)

    def to_json(self) -> dict[str, Any]:
        """Give the job as plain JSON values, with its command line and its log."""
        return {**asdict(self), "words": [*self.words], "command": self.command, "log": self.log}

    @classmethod
    def from_json(cls, data: Any) -> "SweepJob":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError, ValueError."""
        return cls(**fields_of(cls, data))


@dataclass(frozen=True, slots=True)
class Sweep:
    """The jobs of a sweep, and how far they are.

    Attributes:
        file: the name of its file.
        jobs: all of them, by model and texts.
        losses: nats a token above the whole model, at which the share of layers is told.
        states: in which cuts are looked at.
    """

    file: str
    jobs: tuple[SweepJob, ...]
    losses: tuple[float, ...]
    states: tuple[State, ...]

    @property
    def loss(self) -> float:
        """The middle one of the losses, which the headline is about."""
        return self.losses[(len(self.losses) - 1) // 2]

    @property
    def failed(self) -> tuple[SweepJob, ...]:
        """The jobs that failed."""
        return tuple(job for job in self.jobs if job.state == "failed")

    @property
    def is_complete(self) -> bool:
        """Whether every job is done."""
        return all(job.state == "done" for job in self.jobs)

    def to_json(self) -> dict[str, Any]:
        """The content of ``sweep.json``."""
        return {
            "format": "shallower.sweep",
            "version": 1,
            "file": self.file,
            "losses": [*self.losses],
            "states": [*self.states],
            "complete": self.is_complete,
            "jobs": [job.to_json() for job in self.jobs],
        }

    @classmethod
    def from_json(cls, data: Any) -> "Sweep":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError, ValueError."""
        if of_type(dict, data).get("format") != "shallower.sweep" or data["version"] != 1:
            raise ValueError("expected a sweep of version 1")
        return cls(**fields_of(cls, data))


@dataclass(frozen=True, slots=True)
class BestCut:
    """The cut of least loss of one size and state, of all criteria.

    Attributes:
        model: by name.
        state: of the cut.
        share: of the layers that go.
        lost: nats a token above the whole model, paired.
        dropped: the layers that go.
        criterion: that chose them.
    """

    model: str
    state: State
    share: float
    lost: Estimate
    dropped: tuple[int, ...]
    criterion: str

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
    """The share of its layers that a model can lose at a loss.

    Attributes:
        model: by name.
        state: of the cuts.
        loss: nats a token above the whole model.
        share: at which the line through the best cuts of all sizes first exceeds ``loss``.
        low: the same of losses that are one standard error higher.
        high: the same of losses that are one standard error lower.
        most: the share of the largest size that was measured; ``share`` that reaches it is no
            less.
        num_layers: of the model, of which whole ones alone can go.
    """

    model: str
    state: State
    loss: float
    share: float
    low: float
    high: float
    most: float
    num_layers: int

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
    """The share at which the line through (0, 0) and cuts, by size, first exceeds a loss.

    So many standard errors are added to each cut's loss. Of a line that stays below it is the
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


def borne(cuts: Sequence[BestCut], losses: Sequence[float]) -> list[Borne]:
    """Tell by loss which share of its layers a model bears, by its best cuts in one state."""
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
        for loss in losses
    ]
