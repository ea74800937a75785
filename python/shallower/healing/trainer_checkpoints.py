"""The Trainer's checkpoints: one counts once it is marked, and is marked once all of it is on disk.

So an interrupted save is never taken for a checkpoint.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from ..storage import flush_file, flush_folder, write_file

COMPLETE = "complete"
"""The file that marks a checkpoint; nothing is resumed from one without it."""


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
            _delete(of_step(folder, step))


def discard_incomplete(folder: Path) -> None:
    """Delete the checkpoints that are not marked, which interrupted saves left."""
    for step in _steps(folder):
        if not (of_step(folder, step) / COMPLETE).is_file():
            _delete(of_step(folder, step))


def last_step(folder: Path) -> int:
    """The step of the last checkpoint that is marked; 0 if there is none."""
    return max((s for s in _steps(folder) if (of_step(folder, s) / COMPLETE).is_file()), default=0)


def last(folder: Path) -> Path | None:
    """Find the checkpoint of the last step; None if there is no checkpoint."""
    steps = _steps(folder)
    return of_step(folder, steps[-1]) if steps else None


def _steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, complete or not, ascending."""
    names = [entry.name.partition("checkpoint-") for entry in folder.glob("checkpoint-*")]
    return sorted(int(step) for before, _, step in names if not before and step.isdigit())


def _delete(checkpoint: Path) -> None:
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
