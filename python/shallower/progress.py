"""Progress with ETA on standard error, shown where a person looks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def track(
    description: str, total: int | None = None, show: bool | None = None
) -> Iterator[Callable[[int], None]]:
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
        console=console,
        disable=not (console.is_terminal if show is None else show),
        refresh_per_second=4,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)
