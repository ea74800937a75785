"""CriteriaComparison: what each criterion removes, and what that costs, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .counts import counted
from .identity import title_of
from .layers import ranges
from .loss import Loss
from .schema import alike, estimated, fields_of, fields_of_flat, flat, of_type, plain_fields
from .scores import Estimate, Standing


@dataclass(frozen=True, slots=True)
class Row:
    """A cut that a criterion chose, and what the model loses by it.

    All losses are on the test set, which no criterion has seen. ``None`` is what could
    not be measured, or does not exist.

    Attributes:
        model: name of the model.
        texts: name of the calibration texts, which the criterion and the patch looked at.
        criterion: name of the criterion.
        n: layers that go; of experts those of each layer.
        dropped: the indices of the layers.
        cut: the bare cut, its regret by the judge.
        patched: the cut after the quick patch, its regret by its loss, whatever the judge.
        tau: Kendall's τ-b of the criterion's costs of single layers with the true losses without
            them.
        layers_share: ``n`` as a share of all layers.
        parameters_share: the parameters that go as a share of all.
        seconds: wall time that the choice took here, where what is shared is made once.
        layer_forwards: layers run, times texts, that the choice takes by itself.
        score: what the judge says of the bare cut on test items; its loss for the judge ``loss``.
        accuracy: share of right answers, of the judge ``options``.
        unpatched: why there is no ``patched``.
        acceptance: share of the whole model's own words that the bare cut would accept, where
            speech was measured.
        repetition: share of repeated 4-grams in its own words, likewise.
        experts: those that go, as ``--drop-experts`` has them; None for layers.
    """

    model: str
    texts: str
    criterion: str
    n: int
    dropped: tuple[int, ...]
    cut: Standing
    patched: Standing | None
    tau: float | None
    layers_share: float
    parameters_share: float
    seconds: float
    layer_forwards: int
    score: Estimate
    accuracy: float | None = None
    unpatched: str | None = None
    acceptance: Estimate | None = None
    repetition: Estimate | None = None
    experts: str | None = None

    @property
    def words(self) -> str:
        """What goes, in words: ``[12, 20)``, or how many experts of each layer."""
        if self.experts is None:
            return ranges(self.dropped)
        return f"{counted(self.n, 'expert')} a layer"

    def to_json(self) -> dict[str, Any]:
        """Give the columns of the row as plain JSON values; what is not finite is None."""
        tied = self.patched is not None and self.patched.tied
        return {**flat(self, COLUMNS), "patched_tied": tied}

    @classmethod
    def from_json(cls, data: Any) -> "Row":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError."""
        return cls(**fields_of_flat(cls, data, COLUMNS))


COLUMNS = {
    **alike("model", "texts", "criterion", "n", "dropped"),
    **estimated("loss", "cut.loss", "stderr"),
    **estimated("difference", "cut.difference"),
    **estimated("patched", "patched.loss"),
    **estimated("regret", "cut.regret"),
    "tied": "cut.tied",
    **alike("tau", "layers_share", "parameters_share", "seconds", "layer_forwards"),
    **estimated("score"),
    **alike("accuracy", "unpatched"),
    **estimated("patched_difference", "patched.difference"),
    **estimated("patched_regret", "patched.regret"),
    "patched_tied": "patched.tied",
    **estimated("acceptance"),
    **estimated("repetition"),
    **alike("experts"),
}
"""The columns of a row, in JSON and CSV."""


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
        return plain_fields(self)


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
        max_length: tokens of a text, at most.
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
        return cls(**fields_of(cls, data))

    def to_json(self) -> dict[str, Any]:
        """Give ``rows``, ``whole`` (the loss of the first model) and all else by name."""
        whole = self.models[0].whole if self.models else None
        return {
            "format": "shallower.comparison",
            "version": 1,
            "rows": [],  # before the rest
            "whole": whole and {"loss": whole.nats, **whole.to_json()},
            **plain_fields(self),
        }
