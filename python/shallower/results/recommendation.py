"""Recommended: the one cut that a run ends in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..values.counts import with_error
from ..values.layers import ranges
from ..values.plan import Plan
from ..values.schema import fields_of, finite, of_type
from .loss import OUT_OF_DOMAIN, TEST_SET, Loss, recovered
from .scores import Difference, Estimate
from .verification import Verified


@dataclass(frozen=True, slots=True)
class Recommended:
    """The cut that a run ends in; losses are on the test set."""

    verified: Verified  # the race that its plan has won
    reason: str  # of its size, as half a sentence
    whole: Loss
    cut: Loss
    patched: Loss | None  # None where there is no patch
    healed: Loss | None
    by_distance: Difference | None  # the block of least angle less this, bare
    layers_share: float  # the share of layers that go
    parameters_share: float  # the share of parameters that go
    unpatched: str | None = None  # why there is no patch
    unhealed: str | None = None  # why there is no healed model
    max_loss: float | None = None  # nats a token above the whole that were allowed
    out_of_domain: Mapping[str, Loss] = field(default_factory=dict)

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
    def measured(self) -> dict[str, Mapping[str, Loss]]:
        """The losses by state, the last that of this model, by the texts that they are of."""
        losses = {name: getattr(self, name) for name in _LOSSES}
        own = {name: loss for name, loss in losses.items() if loss is not None}
        return {TEST_SET: own} | ({OUT_OF_DOMAIN: self.out_of_domain} if self.out_of_domain else {})

    @property
    def shares(self) -> dict[str, Estimate]:
        """The share of the lost nats that came back, by the texts on which it was measured."""
        return {place: recovered(losses) for place, losses in self.measured.items()}

    @property
    def state(self) -> str:
        """How far the model is made good: ``healed``, ``patched`` or ``cut``."""
        return "healed" if self.healed else "patched" if self.patched else "cut"

    def sentence(self) -> str:
        """Say in one sentence what goes, what that saves, and what it costs."""
        tied, costs = len(self.verified.tied), []
        for place, losses in self.measured.items():
            whole, *_, now = losses.values()
            lost = now.minus(whole)
            more = with_error(lost.mean, lost.stderr, 2, sign=True)
            costs.append(f"{more} on {place} ({whole.nats:.2f} → {now.nats:.2f})")
        cost = " and ".join(costs).replace(" on", " nats a token on", 1)
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
            f"{100 * self.parameters_share:.0f} % of parameters, {cost}, {state}; {rivals}."
        )

    def to_json(self) -> dict[str, Any]:
        """Give the recommendation as plain JSON values, losses in nats a token.

        ``stderr`` is of the last loss, ``paired_stderr`` of its difference to the whole.
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
            "out_of_domain": {name: loss.to_record() for name, loss in self.out_of_domain.items()},
            "sentence": self.sentence(),
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
        """Read what :meth:`to_json` gave."""
        given = {"out_of_domain": {}, **of_type(dict, data), **of_type(dict, data["losses"])}
        return cls(**fields_of(cls, given))


_LOSSES = ("whole", "cut", "patched", "healed")
