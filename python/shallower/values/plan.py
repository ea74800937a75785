"""The plan of a cut: which layers go, and by what criterion; samples that were left out.

Knows no model and no arithmetic; a plan can be printed, saved and loaded.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DAMAGED, ExpertsError, LayersError, PlanError, why
from ..storage import write_file
from .counts import counted
from .experts import DroppedExperts
from .identity import ModelIdentity, TextsIdentity
from .layers import MAX_LAYERS, Block, Layers, blocks_of, dropped_layers, ranges
from .positions import Positions
from .provenance import versions
from .schema import fields_of, of_type


@dataclass(frozen=True, slots=True)
class Rejection:
    """A sample that was left out, by its index among the texts or states, and why."""

    sample: int
    reason: str

    def __str__(self) -> str:
        return f"sample {self.sample}: {self.reason}"


NAMED_REJECTIONS = 100
"""Rejected samples that are named; the rest are only counted."""


def describe_rejections(num_rejected: int, total: int, rejections: Sequence[Rejection]) -> str:
    """Count the rejected samples of ``total`` in one sentence, and name the first of them."""
    named = "; ".join(str(rejection) for rejection in rejections[:5])
    more = f"; and {num_rejected - 5} more" if num_rejected > 5 else ""
    return f"{num_rejected} of {counted(total, 'sample')} rejected: {named}{more}"


STRATEGIES = {
    "similarity": "of all blocks of its size, its ends are most alike at the last token",
    "costs": "of all blocks of its size, it costs least by the criterion named",
    "search": "the best that the search named has found",
    "random": "drawn at random",
    "deepest": "the deepest layers but the last",
    "experts": "of every layer those experts go that the criterion named thinks least of",
    "states": "the layers that the states do not need",
    "manual": "named by hand",
}
"""Every way to choose layers, and what a card says of it."""

Gone = frozenset[int | tuple[int, int]]
"""Layers that go, and of layers that stay experts, as ``(layer, expert)``."""

VERIFIED = "verified"
"""The metric of a plan that won a race of proposals."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A cut before it is made: which layers go, why, and of which model.

    Attributes:
        num_layers: layers of the model before the cut.
        blocks: disjoint half-open ranges to drop, ascending.
        strategy: a row of ``STRATEGIES``.
        metric: the metric behind the score, if one decided.
        model: the model it was made for, if known.
        texts: the calibration texts, if any.
        positions: which of their tokens were compared, if that is known.
        versions: the packages that made it.
        experts: which experts go of the layers that stay; the blocks may be none then.
        states: the hidden states that the cut is made for, ascending, of the strategy ``states``.
    """

    num_layers: int
    blocks: tuple[Block, ...]
    strategy: str = "manual"
    metric: str | None = None
    model: ModelIdentity | None = None
    texts: tuple[TextsIdentity, ...] = ()
    positions: Positions | None = None
    versions: Mapping[str, str] = field(default_factory=versions)
    experts: DroppedExperts | None = None
    states: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.num_layers <= MAX_LAYERS:
            raise LayersError(f"a plan is for 1 to {MAX_LAYERS} layers, not for {self.num_layers}")
        named = self.blocks or self.experts is None
        if named and dropped_layers(self.num_layers, self.blocks) != self.dropped:
            raise LayersError("the blocks of a plan must be ascending")
        if self.experts is not None:
            self._check_experts(self.experts)
        if self.strategy not in STRATEGIES:
            raise PlanError(f"unknown strategy {self.strategy!r}: expected {', '.join(STRATEGIES)}")
        if self.states:
            self._check_states()
        if self.model and self.model.num_layers != self.num_layers:
            raise PlanError(
                f"the plan is for {self.num_layers} layers, its model has {self.model.num_layers}"
            )

    def _check_experts(self, experts: DroppedExperts) -> None:
        for layer in experts.by_layer:
            if layer >= self.num_layers:
                raise ExpertsError(
                    f"experts of layer {layer}: the model's {self.num_layers} layers are "
                    f"0 .. {self.num_layers - 1}"
                )
            if layer in self.dropped:
                raise ExpertsError(f"layer {layer} goes whole: name none of its experts")

    def _check_states(self) -> None:
        behind = Block(self.states[-1] + 1, self.num_layers)
        ascending = self.states == tuple(sorted({*self.states})) and self.states[0] >= 0
        alone = self.experts is None and self.strategy == "states"
        if not (ascending and alone and self.blocks == (behind,)):
            raise PlanError(
                f"a plan for the states {list(self.states)} drops {behind} and nothing else, "
                f"not {self.words}"
            )

    @classmethod
    def of(cls, num_layers: int, layers: "Plan | Layers") -> "Plan":
        """Make a plan of anything that names layers.

        Args:
            num_layers: layers of the model before the cut.
            layers: a plan, which passes through; or blocks, ranges or indices, joined into
                the fewest blocks. A block that touches no other named layer keeps its score;
                one that does joins another pair of states than the one scored, and loses it.

        Returns:
            The plan; ``manual`` unless ``layers`` is a plan, or blocks that one scan or criterion
            chose, which know it.

        Raises:
            PlanError: the plan is, or the blocks were chosen, for another number of layers.
            LayersError: an index outside ``0 .. num_layers-1``, one named twice, none at all,
                or every layer of the model.
        """
        if isinstance(layers, Plan):
            layers.check_layers(num_layers, "the model")
            return layers
        if isinstance(layers, Iterable) and not isinstance(layers, str | bytes | Block):
            layers = tuple(layers)
        dropped = dropped_layers(num_layers, layers)
        named = (layers,) if isinstance(layers, Block) else layers
        scored = {block: block for block in named if isinstance(block, Block)}
        blocks = tuple(scored.get(block, block) for block in blocks_of(dropped))
        by = blocks[0].criterion
        if by is None or any(block.criterion != by for block in blocks):
            return cls(num_layers, blocks)
        return cls(num_layers, blocks, **by)

    @property
    def dropped(self) -> tuple[int, ...]:
        """The indices of the layers that go."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    @property
    def survivors(self) -> tuple[int, ...]:
        """The indices of the layers that stay."""
        gone = set(self.dropped)
        return tuple(layer for layer in range(self.num_layers) if layer not in gone)

    @property
    def gone(self) -> Gone:
        """What goes, whatever it was chosen by, to tell cuts apart."""
        experts = {} if self.experts is None else self.experts.by_layer
        pairs = ((layer, expert) for layer, some in experts.items() for expert in some)
        return frozenset([*self.dropped, *pairs])

    @property
    def words(self) -> str:
        """What goes, in words: ``[12, 20)``, ``2 of 8 experts a layer``, or both."""
        parts = [ranges(self.dropped)] if self.blocks else []
        if self.experts is not None:
            parts.append(f"{self.experts.share} a layer")
        return " and ".join(parts)

    @property
    def key(self) -> dict[str, Any]:
        """What goes, whatever it was chosen by, as a part of the key of a result."""
        if self.experts is None:
            return {"dropped": list(self.dropped)}
        experts = replace(self.experts, criterion=None).to_json()
        return {"dropped": list(self.dropped), "experts": experts}

    @property
    def why(self) -> str:
        """How the layers were chosen, for a card."""
        if (self.strategy, self.metric) == ("search", VERIFIED):
            return "search: of many proposals that a judge has raced, it lost least"
        if self.strategy == "experts":
            return f"{self.metric}: of every layer those experts go that it thinks least of"
        if self.states:
            return (
                f"states {', '.join(map(str, self.states))} of {self.num_layers} layers need "
                f"{ranges(self.survivors)}: the last state of a stock model is behind the final "
                f"norm, so layer {self.states[-1]} stays"
            )
        return f"{self.strategy}: {STRATEGIES[self.strategy]}"

    @property
    def doubt(self) -> str:
        """What a distance does not say, and what does; empty for a plan that is not of one."""
        if self.strategy != "similarity":
            return ""
        return (
            f"Distance is not loss: shallower run MODEL --n {len(self.dropped)} --plan-only "
            f"chooses by the loss on held-out texts."
        )

    def to_json(self) -> dict[str, Any]:
        """Give the plan as plain JSON values, which :meth:`from_json` reads."""
        return {
            "format": "shallower.plan",
            "version": 1 if self.experts is None else 2,
            "num_layers": self.num_layers,
            "drop": [block.to_json() for block in self.blocks],
            "survivors": list(self.survivors),
            "strategy": self.strategy,
            "metric": self.metric,
            "model": asdict(self.model) if self.model else None,
            "texts": [asdict(texts) for texts in self.texts],
            "positions": asdict(self.positions) if self.positions else None,
            "versions": dict(self.versions),
            **({} if self.experts is None else {"experts": self.experts.to_json()}),
            **({"states": list(self.states)} if self.states else {}),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all.

        Args:
            path: the file, replaced where there is one; its folder is made.

        Raises:
            OutputError: the file cannot be written.
        """
        write_file(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """Give the plan as the content of its file."""
        return (json.dumps(self.to_json(), indent=2) + "\n").encode()

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan.

        Args:
            path: a file that :meth:`save` wrote.

        Returns:
            The plan, checked.

        Raises:
            PlanError: the file cannot be read, is not JSON, or holds something else than a plan.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise PlanError(
                f"cannot read the plan {path}: {why(error, path)}; name the file that shallower "
                f"plan wrote, or its folder"
            ) from error
        except DAMAGED as error:
            raise PlanError(
                f"{path} is not a plan of shallower, or is damaged: {why(error)}"
            ) from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """Read what :meth:`to_json` gave, and check it.

        Raises ValueError, KeyError or TypeError for what are not the values of a plan; LayersError,
        PlanError or PositionsError for a plan that cannot be.
        """
        kind, version = of_type(dict, data).get("format"), data.get("version")
        if kind != "shallower.plan" or version not in (1, 2) or isinstance(version, bool):
            raise ValueError(
                f"expected format shallower.plan version 1 or 2, got {kind!r} version {version!r}"
            )
        missing: dict[str, Any] = {"positions": None, "experts": None, "states": []}
        plan = cls(**fields_of(cls, {**missing, **data, "blocks": data["drop"]}))
        if (plan.experts is None) != (version == 1):
            raise ValueError("plans of version 2, and no others, name experts")
        if list(plan.survivors) != data["survivors"]:
            raise ValueError("its survivors are not the layers that its ranges leave")
        return plan

    def check_model(self, model: ModelIdentity) -> None:
        """Refuse another model than the one that the plan was made for.

        Raises PlanError if the number of layers or the fingerprint differs.
        """
        self.check_layers(model.num_layers, model.name)
        if self.model and self.model.fingerprint != model.fingerprint:
            raise self._of_another(self.model.fingerprint[:12], model.name, model.fingerprint[:12])

    def check_layers(self, num_layers: int | None, name: str) -> None:
        """Refuse a model of another number of layers, by its ``name``: PlanError."""
        if self.num_layers != num_layers:
            raise PlanError(
                f"the plan is for {self.num_layers} layers, {name} has {num_layers}: plan again, "
                f"or name the layers yourself"
            )

    def check_type(self, name: str, model_type: str) -> None:
        """Refuse a model of another type, where no more is known of it: PlanError."""
        if self.model and self.model.model_type != model_type:
            raise self._of_another(self.model.model_type, name, model_type)

    def _of_another(self, mine: str, name: str, theirs: str) -> PlanError:
        """The error for the model ``name``, by what differs."""
        return PlanError(
            f"the plan was made for {self.model and self.model.name} ({mine}), and {name} is "
            f"another model ({theirs}): plan again, or name the layers yourself"
        )


def check_plan(plan: object) -> None:
    """Refuse what is given as a plan and is none: PlanError."""
    if not isinstance(plan, Plan):
        raise PlanError(
            f"{type(plan).__name__} is no plan: expected a Plan, as scan.plan or drop_layers "
            f"return, or Plan.of(NUM_LAYERS, LAYERS)"
        )


def gone_by(cut: Plan | Iterable[int]) -> Gone:
    """What goes by a plan, or by layers that are named; nothing of the whole model."""
    return cut.gone if isinstance(cut, Plan) else frozenset(cut)


def key_of(plan: Plan | None) -> dict[str, Any]:
    """What goes by a plan, as a part of the key of a result; nothing without one."""
    return {"dropped": []} if plan is None else plan.key
