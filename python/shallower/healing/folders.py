"""The folders of a healing, without torch: the cut with its plan, and the Trainer's checkpoints.

A checkpoint counts once it is marked, and is marked once all of it is on disk. So an interrupted
save is never taken for a checkpoint.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from ..cutting.plans import plan_file
from ..errors import ModelError, PlanError
from ..models.place import of_hub
from ..storage import flush_file, flush_folder, write_file
from ..values.files import PLAN_FILE
from ..values.plan import Plan

COMPLETE = "complete"
"""The file that marks a checkpoint; nothing is resumed from one without it."""


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


def of_step(folder: Path, step: int) -> Path:
    """The folder in which the Trainer keeps the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def mark_complete(checkpoint: Path) -> None:
    """Flush a checkpoint to disk, and then mark it; OSError or OutputError if that fails."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            flush_file(file)
    flush_folder(checkpoint)
    write_file(checkpoint / COMPLETE, b"")
    flush_folder(checkpoint)


def keep(folder: Path, steps: Collection[int]) -> None:
    """Delete all checkpoints of a training but those of some steps."""
    for step in _steps(folder):
        if step not in steps:
            (of_step(folder, step) / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(of_step(folder, step))


def discard_incomplete(folder: Path) -> None:
    """Delete the checkpoints that are not marked, which interrupted saves left."""
    keep(folder, _marked(folder))


def last_step(folder: Path) -> int:
    """The step of the last checkpoint that is marked; 0 if there is none."""
    return max(_marked(folder), default=0)


def _marked(folder: Path) -> list[int]:
    return [step for step in _steps(folder) if (of_step(folder, step) / COMPLETE).is_file()]


def _steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, complete or not."""
    names = [entry.name.removeprefix("checkpoint-") for entry in folder.glob("checkpoint-*")]
    return [int(step) for step in names if step.isdigit()]
