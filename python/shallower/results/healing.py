"""The record of a healing beside its adapters; its settings are in ``settings/recipe.py``."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import DAMAGED, ModelError, why
from ..settings.recipe import Resolved
from ..values.files import HEALING_FILE
from ..values.identity import AnswersIdentity, ModelIdentity, TextsIdentity
from ..values.plan import Plan
from ..values.provenance import versions
from ..values.schema import fields_of, of_type
from .loss import Loss


@dataclass(frozen=True, slots=True)
class OptimiserStep:
    """One step of the optimiser: the loss before it, in nats a token, and its rate."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Merge:
    """The difference of a merged checkpoint from the adapters on their model.

    ``difference`` is ‖merged − adapters‖ / ‖adapters‖ of the logits, both computed in float32 on
    the unquantised model. Of a model that was too large for that, it is the greatest ‖merged − sum‖
    / ‖sum‖ of a weight, the sum of weight and adapter in float64.
    """

    dtype: str  # of the stored weights
    difference: float
    tolerance: float  # the most that `difference` may be
    max_difference: float  # the greatest of a logit, or of a value of a weight
    trained_difference: float | None = None  # from the model in 4 or 8 bits that was trained
    loss: Loss | None = None  # held-out loss of the merged checkpoint, if it was measured
    check: Literal["logits", "tensors"] = "logits"

    def to_json(self) -> dict[str, Any]:
        """Give the comparison as plain JSON values."""
        return {**asdict(self), "loss": self.loss.to_figures() if self.loss else None}


@dataclass(frozen=True, slots=True)
class Healing:
    """A finished healing.

    Attributes:
        model: identity of the cut model that was healed.
        weights: hash of its weights as they are stored.
        plan: plan of the cut.
        recipe: the settings.
        adapted: number of linear maps, or stacks of experts' ones, that have adapters.
        texts: identity of the training texts.
        steps: training losses.
        held_out: held-out losses by step, from 0 on; empty without held-out texts.
        best_step: the step whose adapters were kept, of the least held-out loss, or the last; 0
            if none was better than the patch that the training began from, which is then the
            result, without adapters.
        original: held-out loss of the uncut model, if it is known.
        cut: held-out loss of the cut before the patch that the training began from, if it is
            known.
        tokens_per_second: speed of the training in the process that ended it.
        merge: the comparison of the merged checkpoint, if the adapters were merged.
        answers: identity of the answers that it was trained on, if there were any.
        versions: versions of the packages that made it.
    """

    model: ModelIdentity
    weights: str
    plan: Plan
    recipe: Resolved
    adapted: int
    texts: TextsIdentity
    steps: tuple[OptimiserStep, ...]
    held_out: Mapping[int, Loss]
    best_step: int
    original: Loss | None = None
    cut: Loss | None = None
    tokens_per_second: float | None = None
    merge: Merge | None = None
    answers: AnswersIdentity | None = None
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def before(self) -> Loss | None:
        """The held-out loss before the first step."""
        return self.held_out.get(0)

    @property
    def after(self) -> Loss | None:
        """The held-out loss at the step that was kept."""
        return self.held_out.get(self.best_step)

    @property
    def recovered(self) -> float | None:
        """The share of the nats lost by the cut that came back; None where not all is known."""
        cut = self.cut or self.before
        if not (cut and self.after and self.original):
            return None
        lost = cut.nats - self.original.nats
        return (cut.nats - self.after.nats) / lost if lost > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Give the JSON values that :meth:`load` reads from a file."""
        return {
            "format": "shallower.healing",
            "version": 1,
            "model": asdict(self.model),
            "weights": self.weights,
            "plan": self.plan.to_json(),
            "recipe": self.recipe.to_json(),
            "adapted": self.adapted,
            "texts": asdict(self.texts),
            **({"answers": asdict(self.answers)} if self.answers else {}),
            "best_step": self.best_step,
            "recovered": self.recovered,
            "original": self.original.to_figures() if self.original else None,
            "cut": self.cut.to_figures() if self.cut else None,
            "held_out": [{"step": at, **loss.to_figures()} for at, loss in self.held_out.items()],
            "steps": [asdict(step) for step in self.steps],
            "tokens_per_second": self.tokens_per_second,
            "merge": self.merge.to_json() if self.merge else None,
            "versions": dict(self.versions),
        }

    def to_bytes(self) -> bytes:
        """Give the content of a JSON file: UTF-8, one newline at the end."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    @classmethod
    def load(cls, path: str | Path) -> "Healing":
        """Read a healing.

        Args:
            path: its file, or the folder that holds it.

        Returns:
            The healing.

        Raises:
            ModelError: it is not there, or is damaged.
        """
        path = Path(path)
        path = path / HEALING_FILE if path.is_dir() else path
        try:
            return cls._from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, *DAMAGED) as error:
            raise ModelError(
                f"{path} is not a healing of shallower, or is damaged ({why(error, path)}): name "
                f"what shallower heal left"
            ) from error

    @classmethod
    def _from_json(cls, data: Any) -> "Healing":
        if (of_type(dict, data).get("format"), data.get("version")) != ("shallower.healing", 1):
            raise ValueError("expected format shallower.healing version 1")
        measured = of_type(list, data["held_out"])
        held_out = {of_type(int, one["step"]): Loss.from_json(one) for one in measured}
        values = fields_of(cls, {"answers": None, **data, "held_out": {}})
        return cls(**{**values, "held_out": held_out})
