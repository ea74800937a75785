"""Curve: what a model loses as more and more of its layers go, by strategy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .loss import Loss
from .schema import fields_of, of_type, plain, plain_fields
from .scores import Difference
from .settings import State
from .speech import Speech
from .task_scores import TaskScores

OWN_STRATEGIES = ("recommended", "similarity", "best_plan", "deepest")
"""The strategies beside the criteria, which are strategies by their names: the verified plan, the
most similar block, the most similar blocks together, the deepest layers but the last."""

SCANNED = ("recommended", "similarity", "best_plan")
"""Those of them that look at a scan."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A model without some of its layers.

    Attributes:
        n: layers that are gone; 0 for the whole model.
        strategy: that chose them; ``whole`` where none is gone.
        state: ``cut``, ``patched`` or ``healed``.
        dropped: the layers that are gone.
        layers_share: ``n`` as a share of all layers.
        parameters_share: the parameters that are gone as a share of all.
        loss: on the test set; None where it could not be measured.
        tasks: scores by task, the main measure of each; those of sampled answers are a task of
            their own, as ``gsm8k sampled``.
        seconds: wall time of the patch or the healing, and of the measurements.
        failed: why there is no loss.
        time_share: the time of a token that is saved as a share of the whole model's, as it is
            forecast for an A100; None where the config of the model does not allow one.
        speech: how it speaks beside the whole model; None where that was not measured.
    """

    n: int
    strategy: str
    state: State
    dropped: tuple[int, ...]
    layers_share: float
    parameters_share: float
    loss: Loss | None
    tasks: tuple[TaskScores, ...] = ()
    seconds: float = 0.0
    failed: str | None = None
    time_share: float | None = None
    speech: Speech | None = None

    def task(self, name: str) -> TaskScores | None:
        """Find the scores of a task; None where it was not done."""
        return next((one for one in self.tasks if one.task == name), None)

    def to_record(self) -> dict[str, Any]:
        """The point as plain JSON values, which :meth:`from_json` reads."""
        return plain_fields(self, "to_record")

    @classmethod
    def from_json(cls, data: Any) -> "CurvePoint":
        """Read what :meth:`to_record` gave; raises KeyError, TypeError, ValueError."""
        return cls(**fields_of(cls, data))


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses and scores of one model over the number of layers that go.

    Attributes:
        model: its name, as a title.
        num_layers: L.
        points: the whole model first, then every cut, by size, strategy and state.
        splits: the number of calibration, selection and test texts.
        dtype: of the weights.
        max_length: tokens of a text, at most.
        versions: of the packages that made the figures.
        settings: the other settings, as ``patch`` (``full`` or ``quick``) and
            ``patch_tokens``, the tokens that a full patch was fitted on; and ``parameters``, the
            number of those of the whole model.
    """

    model: str
    num_layers: int
    points: tuple[CurvePoint, ...]
    splits: Mapping[str, int] = field(default_factory=dict)
    dtype: str = ""
    max_length: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> CurvePoint:
        """The whole model."""
        return self.points[0]

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies, in the order of the points."""
        return tuple(dict.fromkeys(one.strategy for one in self.points if one.n))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that the whole model has done."""
        return tuple(one.task for one in self.whole.tasks)

    @property
    def num_wanted(self) -> int:
        """The number of points beside the whole model that the settings name."""
        return math.prod(len(self.settings.get(name, ())) for name in ("n", "strategies", "states"))

    def line(self, strategy: str, state: State) -> tuple[CurvePoint, ...]:
        """The whole model, and the points of one strategy in one state, by size."""
        found = [one for one in self.points if (one.strategy, one.state) == (strategy, state)]
        return (self.whole, *sorted(found, key=lambda one: one.n))

    def lost(self, point: CurvePoint) -> Difference | None:
        """The paired difference of a point's loss to the whole model.

        None where there is no loss.
        """
        if point.loss is None or self.whole.loss is None:
            return None
        return point.loss.minus(self.whole.loss)

    def best(self, n: int, state: State) -> CurvePoint | None:
        """The point of least loss of all strategies; None where nothing was measured."""
        found = [one for one in self.points if (one.n, one.state) == (n, state) and one.loss]
        return min(found, key=lambda one: one.loss.nats if one.loss else math.inf, default=None)

    def behind(self, point: CurvePoint) -> Difference | None:
        """The difference of a point to the best of its size and state, paired by text.

        A tie where the two do not differ beyond their errors; None for a point without a loss.
        """
        best = self.best(point.n, point.state)
        if point.loss is None or best is None or best.loss is None:
            return None
        return point.loss.minus(best.loss)

    def to_json(self) -> dict[str, Any]:
        """The content of ``curve.json``.

        Every point with ``lost``, its paired difference to the whole.
        """
        points = [{**one.to_record(), "lost": plain(self.lost(one))} for one in self.points]
        return {
            "format": "shallower.curve",
            "version": 1,
            **plain_fields(self),
            "points": points,
        }

    @classmethod
    def from_json(cls, data: Any) -> "Curve":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError, ValueError."""
        if of_type(dict, data).get("format") != "shallower.curve" or data["version"] != 1:
            raise ValueError("expected a curve of version 1")
        curve = cls(**fields_of(cls, {"settings": {}, **data}))
        if not curve.points or curve.points[0].n:
            raise ValueError("expected the whole model as the first point")
        return curve
