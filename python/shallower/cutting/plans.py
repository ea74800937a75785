"""The plan that a cut carries out, from whatever names the layers."""

from dataclasses import replace
from pathlib import Path

from ..errors import PlanError
from ..values.files import PLAN_FILE
from ..values.identity import ModelIdentity
from ..values.layers import Layers
from ..values.plan import Plan


def plan_file(path: str | Path) -> Path:
    """The file of a plan, which is named by itself or by its folder."""
    path = Path(path).expanduser()
    return path / PLAN_FILE if path.is_dir() else path


def load_plan(path: str | Path) -> Plan:
    """Load a plan from its file, or from the folder that holds it; PlanError if there is none."""
    return Plan.load(plan_file(path))


def agreed_plan(named: str, num_layers: int, layers: Plan | Layers) -> Plan:
    """The plan for these layers of the model ``named``; a new one where only layers are given.

    LayersError: a layer that is not there, is named twice, or is the last one left. PlanError: a
    plan for another number of layers.
    """
    if isinstance(layers, Plan) and layers.num_layers != num_layers:
        raise PlanError(
            f"the plan is for {layers.num_layers} layers, {named} has {num_layers}: plan "
            f"again, or name the layers yourself"
        )
    return Plan.of(num_layers, layers)


def made_for(plan: Plan, identity: ModelIdentity | None) -> Plan:
    """Check that a plan fits the model, and give it the identity if it has none.

    ``identity`` is None where the files of the model do not show it. PlanError: the plan was
    made for another model, or that is unknown.
    """
    if identity is not None:
        plan.check_model(identity)
    elif plan.model is not None:
        raise PlanError(
            f"the plan was made for {plan.model.name}, and the names of the tensors do not "
            f"show whether this is the same model: name the layers yourself"
        )
    return plan if plan.model else replace(plan, model=identity)
