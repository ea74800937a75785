"""The Trainer's checkpoints, of which an interrupted save must not be taken for one.

A checkpoint counts once it is marked, and is marked once all of it is on disk.
"""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from ..storage import flush_folder, write_file

COMPLETE = "complete"
"""The file that marks a checkpoint; nothing is resumed from one without it."""


def of_step(folder: Path, step: int) -> Path:
    """Where the Trainer keeps the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint, once all of it is on disk."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    flush_folder(checkpoint)
    write_file(checkpoint / COMPLETE, b"")
    flush_folder(checkpoint)


def keep(folder: Path, steps: Collection[int]) -> None:
    """Delete all checkpoints but those of some steps."""
    for step in _steps(folder):
        if step not in steps:
            _delete(of_step(folder, step))


def discard_incomplete(folder: Path) -> None:
    """Delete what an interrupted save left."""
    for step in _steps(folder):
        if not (of_step(folder, step) / COMPLETE).is_file():
            _delete(of_step(folder, step))


def last(folder: Path) -> Path | None:
    """The checkpoint of the last step, if there is one."""
    steps = _steps(folder)
    return of_step(folder, steps[-1]) if steps else None


def _steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, complete or not, ascending."""
    names = [entry.name.partition("checkpoint-") for entry in folder.glob("checkpoint-*")]
    return sorted(int(step) for before, _, step in names if not before and step.isdigit())


def _delete(checkpoint: Path) -> None:
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
