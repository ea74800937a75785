"""Progress with ETA on standard error, shown where a person looks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Advance(Protocol):
    """Advances a bar by so many steps, and says something beside it."""

    def __call__(self, steps: int, note: str = "", /) -> None:
        """``note`` stays until the next one."""


@contextmanager
def track(
    description: str, total: int | None = None, show: bool | None = None
) -> Iterator[Advance]:
    """Give a function that advances a bar by so many steps.

    Shown if standard error is a terminal, unless ``show`` says otherwise.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not (console.is_terminal if show is None else show),
        refresh_per_second=4,
    )
    with bar:
        task = bar.add_task(description, total=total, note="")

        def advance(steps: int, note: str = "", /) -> None:
            bar.advance(task, steps)
            if note:
                bar.update(task, note=note)

        yield advance
