"""The record of a patch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import PatchError
from ..values.plan import Plan
from ..values.schema import fields_of


@dataclass(frozen=True, slots=True)
class Fit:
    """A layer that was solved anew."""

    layer: int  # 0-based, of the whole model
    matrices: tuple[str, ...]  # names of those that changed
    target: int  # the original state that it was solved for, x^(target)
    ridge: float  # penalty on the change, as a share of the inputs' mean square
    first_weight: float  # of the first token of a text
    explained: float  # share of the missing state that the fit adds on held-out text, R²
    nats: float  # held-out loss with it, in nats a token


@dataclass(frozen=True, slots=True)
class Patch:
    """A finished patch, and its worth on held-out text.

    The held-out texts are every eighth of those given. Choices were made on them, so that a
    loss on other text may be a little worse.

    Attributes:
        plan: the plan that was carried out.
        method: ``refit``.
        num_tokens: tokens that were fitted.
        num_held_out: tokens that choices were made on.
        original: loss of the whole model, in nats a token.
        cut: loss of the cut before the patch, in nats a token.
        patched: loss of the patched cut, in nats a token.
        fits: the layers that were solved anew.
        descent: the loss after the steps that all matrices from the first of these layers on
            took together; empty where they did not help.
        max_length: tokens of a text at most.
        batch_size: texts in one forward.
        most_tokens: tokens that were to be fitted, at most.
        share: the share of answers that was asked for among texts and answers; None where there
            were none.
    """

    plan: Plan
    method: str
    num_tokens: int
    num_held_out: int
    original: float
    cut: float
    patched: float
    fits: tuple[Fit, ...] = ()
    descent: tuple[float, ...] = ()
    max_length: int = 0
    batch_size: int = 0
    most_tokens: int = 0
    share: float | None = None

    @property
    def recovered(self) -> float:
        """The share of the lost nats that came back, on the texts that it chose by; nan of none."""
        lost = self.cut - self.original
        return (self.cut - self.patched) / lost if lost > 0 else math.nan

    def to_json(self) -> dict[str, Any]:
        """The fields, the plan as JSON, and ``recovered``, as plain JSON values."""
        return {
            "format": "shallower.patch",
            "version": 1,
            **asdict(self),
            "plan": self.plan.to_json(),
            "fits": [{**asdict(fit), "matrices": list(fit.matrices)} for fit in self.fits],
            "descent": list(self.descent),
            "recovered": self.recovered,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Patch":
        """Read what :meth:`to_json` gave.

        KeyError, TypeError, ValueError: they are no patch. LayersError, PlanError, PositionsError:
        its plan cannot be.
        """
        return cls(**fields_of(cls, data))


def check_patchable(plan: Plan) -> None:
    """Refuse to patch what drops experts, or keeps states that a patch changes: PatchError."""
    if plan.states:
        raise PatchError(f"the cut is lossless for its states, which a patch changes ({plan.why})")
    if plan.experts is not None:
        raise PatchError(
            f"a patch solves the matrices before layers that go, and this plan also drops "
            f"{plan.experts.count} experts a layer: prune by it, and heal what is left"
        )
