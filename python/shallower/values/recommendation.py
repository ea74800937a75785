"""Recommended: the one cut that a run ends in."""

from dataclasses import dataclass
from typing import Any

from .counts import with_error
from .layers import layer_count, ranges
from .loss import Loss
from .plan import Plan
from .schema import fields_of, finite, of_type
from .scores import Difference
from .verification import Verified

COLLAPSE = 4.0
"""Paired errors from which on the choice by distance is said to fail beside the verified one."""


@dataclass(frozen=True, slots=True)
class Recommended:
    """The cut that a run ends in.

    Losses are on the test set, which nothing was chosen by.

    Attributes:
        verified: the race that its plan has won.
        reason: why so many layers go, as half a sentence.
        whole: loss of the whole model.
        cut: loss of the bare cut.
        patched: loss of the patched cut; None where there is no patch.
        healed: loss of the healed model, if there is one.
        by_distance: what the block of least angular distance loses more than this plan, both as
            bare cuts; None where it is this plan.
        layers_share: the share of the layers that go.
        parameters_share: the share of the parameters that go.
        unpatched: why there is no patch.
        unhealed: why there is no healed model although it was to be healed.
        max_loss: nats a token above the whole that were allowed, if that was the target.
    """

    verified: Verified
    reason: str
    whole: Loss
    cut: Loss
    patched: Loss | None
    healed: Loss | None
    by_distance: Difference | None
    layers_share: float
    parameters_share: float
    unpatched: str | None = None
    unhealed: str | None = None
    max_loss: float | None = None

    @property
    def plan(self) -> Plan:
        """The layers that go."""
        return self.verified.plan

    @property
    def loss(self) -> Loss:
        """The loss of the model that is recommended: healed, else patched, else cut."""
        return self.healed or self.patched or self.cut

    @property
    def difference(self) -> Difference:
        """What that model loses more than the whole one, paired by text."""
        return self.loss.minus(self.whole)

    @property
    def state(self) -> str:
        """How far the model is made good: ``healed``, ``patched`` or ``cut``."""
        return "healed" if self.healed else "patched" if self.patched else "cut"

    def sentence(self) -> str:
        """Say in one sentence what goes, what that saves, and what it costs."""
        lost = self.difference
        tied = len(self.verified.tied)
        if not tied:
            rivals = "all other proposals fell behind"
        elif self.verified.candidates[1].tied:
            others = f" and {tied - 1} more" if tied > 1 else ""
            rivals = f"the next best{others} cannot be told from it"
        else:  # the next best differs from it by more than its smaller error
            rivals = f"{tied} other proposal{'s' if tied > 1 else ''} cannot be told from it"
        state = "not patched" if self.state == "cut" else self.state
        return (
            f"Drop layers {ranges(self.plan.dropped)}: {100 * self.layers_share:.0f} % of layers, "
            f"{100 * self.parameters_share:.0f} % of parameters, "
            f"{with_error(lost.mean, lost.stderr, 2, sign=True)} nats a token "
            f"({self.whole.nats:.2f} → {self.loss.nats:.2f}), {state}; {rivals}."
        )

    def warnings(self) -> list[str]:
        """Say what a user should know before trusting the result; nothing mostly."""
        found = [why for why in (self.unpatched, self.unhealed) if why]
        most, lost, worse = self.max_loss, self.difference, self.by_distance
        if most is not None and lost.mean > most:
            found.append(
                f"the {self.state} model loses {lost} nats a token on the test set, more "
                f"than the {most:g} that it was chosen for on others (max_loss, --max-loss)"
            )
        if lost.mean < 0 and not lost.tied:
            found.append(
                f"the {self.state} model is better than the whole one on the test set, by "
                f"{with_error(-lost.mean, lost.stderr)} nats a token: it has learned the domain "
                f"of the texts; measure on others what was lost (eval)"
            )
        if worse and worse.stderr > 0 and worse.mean > COLLAPSE * worse.stderr:
            found.append(
                f"distance misleads here: its block of {layer_count(len(self.plan.dropped))} loses "
                f"{worse} nats a token more than the verified plan, before a patch"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Give the recommendation as plain JSON values.

        ``dropped``; ``whole``, ``cut``, ``patched`` and ``healed`` in nats a token; ``stderr`` of
        the last of them and ``paired_stderr`` of its difference to the whole; ``layer_forwards``;
        all else beside them.
        """
        losses = {name: getattr(self, name) for name in _LOSSES}
        nats = {name: loss and loss.nats for name, loss in losses.items()}
        return {
            "dropped": list(self.plan.dropped),
            **nats,
            "stderr": finite(self.loss.stderr),
            "paired_stderr": finite(self.difference.stderr),
            "lost": self.difference.mean,
            "layer_forwards": self.verified.layer_forwards,
            "sentence": self.sentence(),
            "warnings": self.warnings(),
            "reason": self.reason,
            "layers_share": self.layers_share,
            "parameters_share": self.parameters_share,
            "unpatched": self.unpatched,
            "unhealed": self.unhealed,
            "max_loss": self.max_loss,
            "by_distance": self.by_distance and self.by_distance.to_json(),
            "verified": self.verified.to_json(),
            "losses": {name: loss and loss.to_record() for name, loss in losses.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> "Recommended":
        """Read what :meth:`to_json` gave.

        KeyError, TypeError, ValueError: the values are not those of one. LayersError, PlanError: a
        plan cannot be.
        """
        return cls(**fields_of(cls, {**of_type(dict, data), **of_type(dict, data["losses"])}))


_LOSSES = ("whole", "cut", "patched", "healed")
