"""Verified: the plan that won a race of proposals, and what came in beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..values.counts import counted, with_error
from ..values.layers import ranges
from ..values.plan import Plan
from ..values.schema import fields_of, plain, plain_fields
from .scores import Difference

AFTER = ("none", "patch")
"""When a proposal is judged: as it is cut, or after a quick patch."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was proposed, and how it fared."""

    plan: Plan
    proposed_by: tuple[str, ...]  # criteria and searches
    score: float  # the judge's mean over the items that it was judged on
    stderr: float
    difference: Difference  # paired, to the winner, over the items of both; 0 for the winner
    lost_early: bool = False  # lost, or given up, before the last items

    @property
    def tied(self) -> bool:
        """Whether it cannot be told from the winner, on the items of both: few if lost early."""
        return self.difference.tied

    def to_json(self) -> dict[str, Any]:
        """Give the fields, and ``dropped`` beside them, as plain JSON values."""
        return {"dropped": list(self.plan.dropped), **plain_fields(self), "tied": self.tied}

    @classmethod
    def from_json(cls, data: Any) -> "Candidate":
        """Read what :meth:`to_json` gave; raises as :meth:`Verified.from_json`."""
        return cls(**fields_of(cls, data, nan=("score", "stderr")))


@dataclass(frozen=True, slots=True)
class Verified:
    """The verified plan of one size.

    Attributes:
        n: layers that go.
        after: ``none``, judged as they are cut; ``patch``, after a quick patch.
        judge: name of the judge.
        unit: of its scores, as ``nats a token``.
        candidates: those that came into the last race, the winner first, then by their paired
            difference to it: scores of different items do not compare.
        num_items: selection items.
        num_proposals: cuts that were proposed, by criteria and by the search.
        layer_forwards: layers run, times texts, for proposals and race together.
        seconds: wall time of both.
        failed: the criteria that could not propose, and the proposals that could not be judged,
            with the reason.
    """

    n: int
    after: str
    judge: str
    unit: str
    candidates: tuple[Candidate, ...]
    num_items: int
    num_proposals: int
    layer_forwards: int
    seconds: float
    failed: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError("no candidates")
        others = sorted(self.candidates[1:], key=lambda one: one.difference.mean)
        object.__setattr__(self, "candidates", (*self.candidates[:1], *others))

    @property
    def measure(self) -> str:
        """What the judge measures, in a word: a divergence from the whole model, or a loss."""
        return "divergence" if self.judge == "speech" else self.judge

    @property
    def measured_in(self) -> str:
        """The unit of scores, and of what they are where that is no loss."""
        more = " of divergence from the whole model on its own words"
        return self.unit + (more if self.judge == "speech" else "")

    @property
    def what_chooses(self) -> str:
        """What the items are."""
        return "prompts" if self.judge == "speech" else "texts"

    @property
    def plan(self) -> Plan:
        """The winner."""
        return self.candidates[0].plan

    @property
    def tied(self) -> tuple[Candidate, ...]:
        """The others that cannot be told from the winner."""
        return tuple(candidate for candidate in self.candidates[1:] if candidate.tied)

    @property
    def margin(self) -> Difference | None:
        """What the nearest of the others loses more than the winner; None where it is alone."""
        return self.candidates[1].difference if len(self.candidates) > 1 else None

    def sentence(self) -> str:
        """Say who won, by how much, and who cannot be told from it, without a full stop."""
        best = self.candidates[0]
        after = {"none": "as it is cut", "patch": "after a quick patch"}[self.after]
        said = (
            f"{ranges(best.plan.dropped)} of {counted(self.num_proposals, 'proposal')}: "
            f"{with_error(best.score, best.stderr, 2)} {self.measured_in} {after}, on the "
            f"selection {self.what_chooses}"
        )
        if self.margin is not None:
            amount = with_error(abs(self.margin.mean), self.margin.stderr, 3)
            few = self.margin.num_items
            where = f" on {counted(few, self.what_chooses[:-1])}" if few < self.num_items else ""
            said += f", {amount} {'more' if self.margin.mean < 0 else 'less'} than the next{where}"
        if self.tied:
            more = f" and {counted(len(self.tied) - 1, 'other')}" if len(self.tied) > 1 else ""
            said += f"; {ranges(self.tied[0].plan.dropped)}{more} cannot be told from it"
        return said

    def to_json(self) -> dict[str, Any]:
        """Give the fields, and ``dropped`` beside them, as plain JSON values."""
        head = {"format": "shallower.verified", "version": 1, "dropped": list(self.plan.dropped)}
        return {**head, **plain_fields(self), "margin": plain(self.margin)}

    @classmethod
    def from_json(cls, data: Any) -> "Verified":
        """Read what :meth:`to_json` gave.

        KeyError, TypeError, ValueError: the values are not those of a result. LayersError,
        PlanError: a plan cannot be.
        """
        return cls(**fields_of(cls, data))
