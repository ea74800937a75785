"""The plan that a cut carries out, from whatever names the layers and the experts."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ExpertsError, LayersError, PlanError
from ..values.experts import DroppedExperts, Experts, experts_file, parse_experts
from ..values.files import PLAN_FILE
from ..values.identity import ModelIdentity
from ..values.layers import Block, Layers, layer_number, ranges
from ..values.plan import Plan


@dataclass(frozen=True, slots=True)
class ForStates:
    """The layers that some hidden states do not need, as what is dropped.

    State ``i`` is ``hidden_states[i]`` of transformers, the input of layer ``i``; state 0 is the
    embeddings. The last state of a stock model is behind the final norm, so state K needs the
    layers ``[0, K + 1)``. Several image models read such states of their text encoder.

    Attributes:
        states: integers in any order; kept ascending, each once.

    Raises:
        LayersError: no state is named, or one is not an integer.

    Example:
        >>> plan = sh.prune("HuggingFaceTB/SmolLM2-135M", sh.ForStates([9, 18]), "encoder")
        >>> plan.survivors == tuple(range(19))
        True
    """

    states: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.states, str) or not isinstance(self.states, Iterable):
            raise LayersError(f"{self.states!r} names no states: expected integers, as [9, 18, 27]")
        states = tuple(sorted({layer_number(state) for state in self.states}))
        if not states:
            raise LayersError("no state is named: name at least one that is read")
        object.__setattr__(self, "states", states)

    @classmethod
    def parse(cls, text: str) -> "ForStates":
        """Read ``"9,18,27"``; LayersError if a part is not an integer."""
        parts = text.split(",")
        if not all(re.fullmatch(r"\s*-?[0-9]{1,9}\s*", part) for part in parts):
            raise LayersError(f"cannot read the states {text!r}: expected integers such as 9,18,27")
        return cls(tuple(map(int, parts)))

    def plan(self, num_layers: int) -> Plan:
        """Plan the cut of a model; LayersError if it has not these states, or none can go."""
        first, last = self.states[0], self.states[-1]
        if first < 0:
            raise LayersError(
                f"state {first} counts from the end, where layers go: expected states from 0 on "
                f"(of {num_layers} layers -1 is {num_layers}, which is behind the final norm)"
            )
        if last > num_layers:
            raise LayersError(
                f"the model has no state {last}: its {num_layers} layers have the states "
                f"0 .. {num_layers}"
            )
        if last >= num_layers - 1:
            raise LayersError(
                f"state {last} of {num_layers} layers needs all of them, since the last state of a "
                f"stock model is behind the final norm: no layer can go"
            )
        blocks = (Block(last + 1, num_layers),)
        return Plan(num_layers, blocks, "states", states=self.states)

    def to_json(self) -> dict[str, list[int]]:
        """The states as plain JSON values."""
        return {"for_states": list(self.states)}


NamedLayers = Plan | Layers | ForStates
"""A plan, layers by their places, or those that some hidden states do not need."""


def plan_file(path: str | Path) -> Path:
    """The file of a plan, which is named by itself or by its folder."""
    path = Path(path).expanduser()
    return path / PLAN_FILE if path.is_dir() else path


def load_plan(path: str | Path) -> Plan:
    """Load a plan from its file, or from the folder that holds it; PlanError if there is none."""
    return Plan.load(plan_file(path))


def experts_path(named: str | Path) -> Path | None:
    """The file of experts, or of a plan of them; None where experts are named themselves."""
    file = experts_file(named)
    return None if file is None else plan_file(file)


def load_experts(named: str | Path) -> Plan | dict[int, tuple[int, ...]]:
    """Read experts, a file of them, or a plan: a folder or a ``.json`` file."""
    path = experts_path(named)
    return load_plan(path) if path and path.suffix == ".json" else parse_experts(named)


NamedExperts = Plan | DroppedExperts | Experts | str | Path
"""A plan that drops nothing else, or what :meth:`.DroppedExperts.of` takes."""


def agreed_plan(
    named: str,
    num_layers: int,
    layers: NamedLayers,
    *,
    experts: NamedExperts | None = None,
    count_experts: Callable[[], int] = int,
) -> Plan:
    """The plan for these layers of the model ``named``; a new one where only layers are given.

    ``experts`` go of the layers that stay; the layers may be none then. ``count_experts`` gives the
    number that a layer has, where they are named without it. Raises LayersError, ExpertsError,
    PlanError.
    """
    if experts is None:
        return _agreed_layers(named, num_layers, layers)
    none = isinstance(layers, Sequence) and not layers
    plan = None if none else _agreed_layers(named, num_layers, layers)
    if plan is not None and plan.experts is not None:
        raise ExpertsError("the plan names experts already: name no others beside it")
    if plan is not None and plan.states:
        raise ExpertsError("states need all experts of the layers that stay: name none to drop")
    if isinstance(experts, Plan):
        return _with_layers(_agreed_layers(named, num_layers, experts), plan)
    if not isinstance(experts, DroppedExperts):
        experts = DroppedExperts.of(count_experts(), experts)
    return Plan(num_layers, (), experts=experts) if plan is None else replace(plan, experts=experts)


def _with_layers(plan: Plan, layers: Plan | None) -> Plan:
    """A plan of experts, with the layers of another one; those lose no experts then."""
    if plan.experts is None:
        raise PlanError("the plan names no experts: make one with experts, or leave it out")
    if layers is None:
        return plan
    if plan.blocks:
        raise PlanError(
            f"the plan of experts drops the layers {ranges(plan.dropped)} already: name no others "
            f"beside it"
        )
    return replace(plan, blocks=layers.blocks, experts=plan.experts.without(layers.dropped))


def _agreed_layers(named: str, num_layers: int, layers: NamedLayers) -> Plan:
    if isinstance(layers, ForStates):
        return layers.plan(num_layers)
    if isinstance(layers, Plan):
        layers.check_layers(num_layers, named)
    return Plan.of(num_layers, layers)


def made_for(plan: Plan, identity: ModelIdentity | None) -> Plan:
    """A plan with the identity of its model, None if unknown; PlanError if it is of another one."""
    if identity is not None:
        plan.check_model(identity)
    elif plan.model is not None:
        raise PlanError(
            f"the plan was made for {plan.model.name}, and the names of the tensors do not "
            f"show whether this is the same model: name the layers yourself"
        )
    return plan if plan.model else replace(plan, model=identity)
