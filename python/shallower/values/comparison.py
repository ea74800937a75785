"""CriteriaComparison: what each criterion removes, and what that costs, row by row."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .counts import counted
from .identity import title_of
from .layers import ranges
from .loss import Loss
from .schema import fields_of, of_type, row_to_json


@dataclass(frozen=True, slots=True)
class Standing:
    """What a cut loses in one state, and how far it is behind the best of its size in that state.

    Attributes:
        loss: nats a token.
        stderr: its standard error.
        difference: ``loss`` less that of the whole model.
        difference_stderr: its paired standard error.
        regret: what the cut is behind the best; 0 for the best itself.
        regret_stderr: its paired standard error.
        tied: whether the cut cannot be told from the best.
    """

    loss: float
    stderr: float | None
    difference: float
    difference_stderr: float | None
    regret: float
    regret_stderr: float | None
    tied: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A cut that a criterion chose, and the loss of the model without these layers.

    All losses are on the test set, which no criterion has seen. ``None`` is what could
    not be measured, or does not exist.

    Attributes:
        model: name of the model.
        texts: name of the calibration texts, which the criterion and the patch looked at.
        criterion: name of the criterion.
        n: layers that go.
        dropped: their indices.
        loss: nats a token of the cut.
        stderr: its standard error.
        difference: ``loss`` less that of the whole model.
        difference_stderr: paired standard error of ``difference``.
        patched: nats a token after the quick patch.
        patched_stderr: its standard error.
        regret: judge's score of the bare cut less that of the best bare cut of ``n`` layers in
            the comparison.
        regret_stderr: its paired standard error; 0 for the best itself.
        tied: whether the bare cut cannot be told from the best of ``n`` layers.
        tau: Kendall's τ-b of the criterion's costs of single layers with the true losses without
            them.
        layers_share: ``n`` as a share of all layers.
        parameters_share: the parameters that go as a share of all.
        seconds: wall time that the choice took here, where what is shared is made once.
        layer_forwards: layers run, times texts, that the choice takes by itself.
        score: what the judge says of the cut on test items; as ``loss`` for the judge
            ``loss``.
        score_stderr: its standard error.
        accuracy: share of right answers, of the judge ``options``.
        unpatched: why there is no ``patched``.
        patched_difference: ``patched`` less the loss of the whole model.
        patched_difference_stderr: paired standard error of ``patched_difference``.
        patched_regret: ``patched`` less that of the best patched cut of ``n`` layers in the
            comparison, nats a token whatever the judge.
        patched_regret_stderr: its paired standard error; 0 for the best itself.
        patched_tied: whether the patched cut cannot be told from the best patched one.
        acceptance: share of the whole model's own words that the bare cut would accept; None where
            speech was not measured, as for what follows.
        acceptance_stderr: its standard error.
        repetition: share of repeated 4-grams in its own words.
        repetition_stderr: its standard error.
        experts: of a comparison of experts those that go, as ``--drop-experts`` has them; ``n`` of
            each layer. None for layers.
    """

    model: str
    texts: str
    criterion: str
    n: int
    dropped: tuple[int, ...]
    loss: float
    stderr: float
    difference: float
    difference_stderr: float
    patched: float | None
    patched_stderr: float | None
    regret: float
    regret_stderr: float
    tied: bool
    tau: float | None
    layers_share: float
    parameters_share: float
    seconds: float
    layer_forwards: int
    score: float
    score_stderr: float
    accuracy: float | None = None
    unpatched: str | None = None
    patched_difference: float | None = None
    patched_difference_stderr: float | None = None
    patched_regret: float | None = None
    patched_regret_stderr: float | None = None
    patched_tied: bool = False
    acceptance: float | None = None
    acceptance_stderr: float | None = None
    repetition: float | None = None
    repetition_stderr: float | None = None
    experts: str | None = None

    @property
    def cut(self) -> tuple[tuple[int, ...], str | None]:
        """What goes, to tell cuts apart."""
        return self.dropped, self.experts

    @property
    def words(self) -> str:
        """What goes, in words: ``[12, 20)``, or how many experts of each layer."""
        if self.experts is None:
            return ranges(self.dropped)
        return f"{counted(self.n, 'expert')} a layer"

    @property
    def as_cut(self) -> Standing | None:
        """The bare cut, by the judge; None where its regret is not known."""
        if not math.isfinite(self.regret):
            return None
        return Standing(
            self.loss,
            self.stderr,
            self.difference,
            self.difference_stderr,
            self.regret,
            self.regret_stderr,
            self.tied,
        )

    @property
    def as_patched(self) -> Standing | None:
        """The cut after the quick patch, by its loss; None where it was not patched, or compared
        with no other, as by an older version.
        """
        if self.patched is None or self.patched_difference is None or self.patched_regret is None:
            return None
        return Standing(
            self.patched,
            self.patched_stderr,
            self.patched_difference,
            self.patched_difference_stderr,
            self.patched_regret,
            self.patched_regret_stderr,
            self.patched_tied,
        )

    def to_json(self) -> dict[str, Any]:
        """Give the row as plain JSON values; what is not finite is None."""
        return row_to_json(self)

    @classmethod
    def from_json(cls, data: Any) -> "Row":
        """Read what :meth:`to_json` gave; older versions wrote less. Raises KeyError, TypeError."""
        return cls(**fields_of(cls, {**_older(cls), **of_type(dict, data)}, nan=_FIGURES))


_FIGURES = tuple(one.name for one in fields(Row) if one.type is float)


def _older(kind: Any) -> dict[str, Any]:
    """The fields that older versions did not write, as they are then."""
    return {one.name: one.default for one in fields(kind) if one.default is not MISSING}


@dataclass(frozen=True, slots=True)
class ComparedModel:
    """What a comparison says of one model beside its rows.

    Attributes:
        name: of the model.
        num_layers: L.
        whole: the loss of the whole model on the test set.
        single_layers: the true losses without each single layer, (L,), nats a token.
        chance: accuracy of a guess, of the judge ``options``.
        accuracy: that of the whole model.
        dtype: of its weights; empty where it is not known.
        parameters: their number; None where it is not known.
        num_experts: routed experts of a layer, of a comparison of experts; None for one of layers.
    """

    name: str
    num_layers: int
    whole: Loss
    single_layers: tuple[float, ...] = ()
    chance: float | None = None
    accuracy: float | None = None
    dtype: str = ""
    parameters: int | None = None
    num_experts: int | None = None

    @property
    def title(self) -> str:
        """The name for tables and figures: of a place on this machine its last part."""
        return title_of(self.name)

    def to_json(self) -> dict[str, Any]:
        """Give the model as plain JSON values."""
        return {
            "name": self.name,
            "num_layers": self.num_layers,
            "whole": self.whole.to_json(),
            "single_layers": list(self.single_layers),
            "chance": self.chance,
            "accuracy": self.accuracy,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "num_experts": self.num_experts,
        }

    @classmethod
    def from_json(cls, data: Any) -> "ComparedModel":
        """Read what :meth:`to_json` gave; older versions wrote less."""
        older = {**_older(cls), "single_layers": []}
        return cls(**fields_of(cls, {**older, **of_type(dict, data)}))


@dataclass(frozen=True, slots=True)
class CriteriaComparison:
    """Criteria compared on one or several models.

    Attributes:
        models: the models that were compared, in order.
        rows: every choice, by model, texts, criterion and n.
        failures: the models that could not be compared, and why.
        skipped: the criteria that could not choose, and why.
        judge: name of the judge that chose.
        unit: of a score of that judge.
        splits: the number of calibration, selection and test texts.
        max_length: tokens of a text, at most; 0 where that is not known.
        versions: of the packages that made the figures.
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

    @classmethod
    def from_json(cls, data: Any) -> "CriteriaComparison":
        """Read what :meth:`to_json` gave; raises ValueError, KeyError, TypeError."""
        if of_type(dict, data).get("format") != "shallower.comparison" or data["version"] != 1:
            raise ValueError("expected format shallower.comparison version 1")
        return cls(**fields_of(cls, {"max_length": 0, "versions": {}, **data}))

    def to_json(self) -> dict[str, Any]:
        """Give ``rows``, ``whole`` (the loss of the first model) and all else by name."""
        models = [model.to_json() for model in self.models]
        whole = self.models[0].whole if self.models else None
        return {
            "format": "shallower.comparison",
            "version": 1,
            "rows": [row.to_json() for row in self.rows],
            "whole": whole and {"loss": whole.nats, **whole.to_json()},
            "models": models,
            "failures": dict(self.failures),
            "skipped": dict(self.skipped),
            "judge": self.judge,
            "unit": self.unit,
            "splits": dict(self.splits),
            "max_length": self.max_length,
            "versions": dict(self.versions),
        }
