"""The cut that is healed, by the plan beside it; without torch, so that mistakes show at once."""

from pathlib import Path

from ..cutting.plans import plan_file
from ..errors import ModelError, PlanError
from ..models.place import of_hub
from ..values.files import PLAN_FILE
from ..values.plan import Plan


def plan_of_cut(path: str) -> Plan:
    """Read the plan beside a cut, in its folder or at the hub; PlanError refuses one for states."""
    folder = Path(path).expanduser()
    if folder.suffix == ".gguf" and not folder.is_dir():
        raise ModelError(
            f"{path} is a GGUF file, and no such weights are trained: cut the whole model into a "
            f"folder (shallower prune MODEL.gguf --drop LAYERS --out cut), and heal that"
        )
    if not folder.is_dir() and (folder.exists() or path.startswith(("/", ".", "~"))):
        kind = "a file" if folder.exists() else "not there"
        raise ModelError(f"{path} is {kind}: expected the folder of a cut, or a hub id")
    found = plan_file(folder) if folder.is_dir() else of_hub(path, PLAN_FILE)
    if found is None or not found.is_file():
        raise PlanError(
            f"{path} was not cut: there is no {PLAN_FILE} beside its weights. Cut a model first: "
            f"shallower prune MODEL --drop 12:20 --out cut",
            see="healing",
        )
    plan = Plan.load(found)
    if plan.states:
        raise PlanError(f"{path} is lossless for its states, which a healing changes ({plan.why})")
    return plan
