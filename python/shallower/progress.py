"""Progress with ETA on standard error: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
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

SECONDS_BETWEEN_LINES = 30.0

BytesProgress = Callable[[int, int], object]
"""Receives the bytes written so far and those in all; what it raises stops the copy."""


class Advance(Protocol):
    """A function that advances a bar."""

    def __call__(self, steps: int, note: str = "", /) -> None:
        """Advance by so many steps; ``note`` is shown beside the bar until the next one."""


@contextmanager
def track(
    description: str, total: int | None = None, show: bool | None = None
) -> Iterator[Advance]:
    """Show the progress of long work.

    Args:
        description: name of the work.
        total: steps of the work, if their number is known.
        show: True for a bar anywhere, False for silence. By default a bar if standard error is a
            terminal that can redraw one, and else lines: as the work begins, twice a minute, and as
            it ends.

    Yields:
        A function that advances by so many steps.
    """
    if show is False:
        yield lambda _steps, _note="", /: None
        return
    console = Console(stderr=True)
    if show is None and (console.is_dumb_terminal or not console.is_terminal):
        lines = _Lines(description, total)
        yield lines
        lines.end()
        return
    with _bars(console) as bars:
        task = bars.add_task(description, total=total, note="")

        def advance(steps: int, note: str = "", /) -> None:
            bars.advance(task, steps)
            if note:
                bars.update(task, note=note)

        yield advance
        if len(bars.tasks) > 1:  # it was a part of other work, whose bar goes on
            bars.remove_task(task)


_BARS: ContextVar[Progress | None] = ContextVar("_BARS", default=None)
"""The bars that are on the terminal; work within other work has one more."""


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    """Open bars on a terminal, or give those that are there."""
    there = _BARS.get()
    if there is not None:
        yield there
        return
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        refresh_per_second=4,
    )
    with bars:
        opened = _BARS.set(bars)
        try:
            yield bars
        finally:
            _BARS.reset(opened)


@contextmanager
def track_copy(progress: BytesProgress | bool | None, total: int) -> Iterator[BytesProgress]:
    """Give a function that receives the bytes written so far and those in all.

    That is ``progress`` itself, if it is one; else a bar, or none: shown as :func:`track` does.
    """
    if callable(progress):
        yield progress
        return
    with track("copy, MiB", total >> 20, progress) as advance:
        shown = 0

        def report(done: int, _total: int) -> None:
            nonlocal shown
            advance((done >> 20) - shown)
            shown = done >> 20

        yield report


def say_goes_on(where: str, show: bool | None = None) -> None:
    """Say on standard error from where work goes on that was cut short, unless ``show`` is False.

    ``where`` is what was done, in a few words.
    """
    if show is not False:
        print(f"goes on: {where}", file=sys.stderr, flush=True)


class _Lines:
    """Lines about long work, for a log."""

    def __init__(self, description: str, total: int | None) -> None:
        self._description, self._total = description, total
        self._done, self._note = 0, ""
        self._began = self._said = time.monotonic()
        self._done_then: int | None = None
        self._say(description if total is None else f"{description} 0/{total}")

    def end(self) -> None:
        """Say that the work is done."""
        self._say(f"{self._description} done", _clock(time.monotonic() - self._began))

    def __call__(self, steps: int, note: str = "", /) -> None:
        self._done += steps
        self._note = note or self._note
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        parts = [
            f"{self._description} {self._done}/{self._total or '?'}",
            _clock(now - self._began),
        ]
        # By what was done since the last line: before the first, a resumed work leaps.
        if self._total and self._done_then is not None and self._done > self._done_then:
            speed = (self._done - self._done_then) / (now - self._said)
            left = max(0, self._total - self._done)  # a total may be an estimate
            parts.append(f"eta {_clock(left / speed)}")
        self._said, self._done_then = now, self._done
        self._say(*parts, self._note)

    def _say(self, *parts: str | None) -> None:
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
