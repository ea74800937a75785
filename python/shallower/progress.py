"""Progress with ETA on standard error: a bar on a terminal, a line now and then in a log.

Other packages' bars and notes are kept off it.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 30.0

BytesProgress = Callable[[int, int], object]
"""Receives the bytes written so far and those in all; what it raises stops the copy."""


class Advance(Protocol):
    """A function that advances a bar."""

    def __call__(self, steps: int, note: str = "", /) -> None:
        """Advance by so many steps; ``note`` is shown beside the bar until the next one."""


class Shown(Advance, Protocol):
    """A bar that learns how many steps there are while the work goes on."""

    def expect(self, steps: int) -> None:
        """Add so many steps to the total."""


@contextmanager
def track(description: str, total: int | None = None, show: bool | None = None) -> Iterator[Shown]:
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
        yield _Silence()
        return
    if show is None and not _can_redraw():
        lines = _Lines(description, total)
        yield lines
        lines.end()
        return
    from rich.console import Console

    with _bars(Console(stderr=True)) as bars:
        bar = _Bar(bars, bars.add_task(description, total=total, note=""))
        yield bar
        if len(bars.tasks) > 1:  # it was a part of other work, whose bar goes on
            bars.remove_task(bar.task)


_BESIDE_NAME = 30
"""Columns of a terminal that the bar, its count and its times need beside the name of the work."""

_BARS: ContextVar["Progress | None"] = ContextVar("_BARS", default=None)
"""The bars that are on the terminal; work within other work has one more."""


def _can_redraw() -> bool:
    """Whether standard error is a terminal that can; without rich, which takes long to import."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def _bars(console: "Console") -> Iterator["Progress"]:
    """Open bars on a terminal, or give those that are there."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    there = _BARS.get()
    if there is not None:
        yield there
        return
    named = Column(no_wrap=True, max_width=max(10, console.width - _BESIDE_NAME))
    bars = Progress(
        TextColumn("{task.description}", markup=False, table_column=named),
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


class _Bar:
    """A bar of rich."""

    def __init__(self, bars: "Progress", task: "TaskID") -> None:
        self._bars, self.task = bars, task

    def __call__(self, steps: int, note: str = "", /) -> None:
        self._bars.advance(self.task, steps)
        if note:
            self._bars.update(self.task, note=note)

    def expect(self, steps: int) -> None:
        """As :class:`Shown`."""
        (task,) = (one for one in self._bars.tasks if one.id == self.task)
        self._bars.update(self.task, total=(task.total or 0) + steps)


class _Silence:
    """No bar."""

    def __call__(self, _steps: int, _note: str = "", /) -> None:
        pass

    def expect(self, _steps: int) -> None:
        """As :class:`Shown`."""


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
        self._say(f"{description} …" if total is None else f"{description} 0/{total}")

    def expect(self, steps: int) -> None:
        """As :class:`Shown`."""
        self._total = (self._total or 0) + steps

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
        left = (self._total or 0) - self._done  # below 0 where an estimate was too low
        if left >= 0 and self._done_then is not None and self._done > self._done_then:
            speed = (self._done - self._done_then) / (now - self._said)
            parts.append(f"eta {_clock(left / speed)}")
        self._said, self._done_then = now, self._done
        self._say(*parts, self._note)

    def _say(self, *parts: str | None) -> None:
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


_LOGGERS = (
    "accelerate.big_modeling",
    "bitsandbytes.backends.cpu.ops",
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "transformers.generation",
)

_HUSHED: ContextVar[bool] = ContextVar("hushed", default=False)
_SHOWN: ContextVar[Shown | None] = ContextVar("shown", default=None)


@contextmanager
def hushed(shown: Shown | None = None) -> Iterator[None]:
    """Keep other packages' bars and notes off standard error in the body, in this thread.

    What they count is shown on ``shown``: loops as steps, and downloads as a note.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [one.level for one in loggers]
    mine = _HUSHED.set(True), _SHOWN.set(shown or _SHOWN.get())
    with warnings.catch_warnings(), _THEIRS:
        warnings.filterwarnings("ignore", module=r"(lm_eval|datasets|evaluate|sklearn)\b")
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            _HUSHED.reset(mine[0])
            _SHOWN.reset(mine[1])
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


class _TheirBars:
    """Replaces tqdm's methods for as long as any thread is hushed; others keep their bars."""

    _NAMES = ("__init__", "__iter__", "update")

    def __init__(self) -> None:
        self._lock, self._depth = Lock(), 0
        self._theirs: dict[str, Any] = {}

    def __enter__(self) -> None:
        from tqdm import tqdm

        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._theirs = {name: getattr(tqdm, name) for name in self._NAMES}
                for name in self._NAMES:
                    setattr(tqdm, name, self._replaced(name))

    def __exit__(self, *_: object) -> None:
        from tqdm import tqdm

        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                for name, method in self._theirs.items():
                    setattr(tqdm, name, method)

    def _replaced(self, name: str) -> Callable[..., Any]:
        all_ours: dict[str, Callable[..., Any]] = {
            "__init__": _begin,
            "__iter__": _loop,
            "update": _count,
        }
        theirs, ours = self._theirs[name], all_ours[name]

        def method(bar: Any, *arguments: Any, **options: Any) -> Any:
            is_hushed = _HUSHED.get() if name == "__init__" else hasattr(bar, "shown")
            if not is_hushed:
                return theirs(bar, *arguments, **options)
            return ours(bar, theirs, *arguments, **options)

        return method


_THEIRS = _TheirBars()


def _begin(bar: Any, theirs: Callable[..., None], *arguments: Any, **options: Any) -> None:
    theirs(bar, *arguments, **{**options, "disable": True})
    bar.shown, bar.told = _SHOWN.get(), str(options.get("desc") or "").rstrip(" :.")
    if bar.shown is not None and bar.iterable is not None and bar.total:
        bar.shown.expect(int(bar.total))


def _loop(bar: Any, _theirs: object) -> Iterator[Any]:
    for one in bar.iterable:
        yield one
        if bar.shown is not None and bar.total:
            bar.shown(1)


def _count(bar: Any, _theirs: object, steps: float | None = 1) -> None:
    bar.n += steps or 0
    if bar.shown is not None:
        total = bar.format_sizeof(bar.total) if bar.total else "?"
        bar.shown(0, f"{bar.told} {bar.format_sizeof(bar.n)}/{total}".strip())
