"""Progress with ETA on standard error: a bar on a terminal, a line now and then in a log."""

import math
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 25.0
"""Between two lines of a log about long work, so that there is one every half minute."""

SECONDS_TO_BE_SHOWN = 10.0
"""What work within other work must take, or the log keep silent, until its end is a line."""

BytesProgress = Callable[[int, int], object]
"""Receives the bytes written so far and those in all; what it raises stops the copy."""

Advance = Callable[..., None]
"""Advances a bar by so many steps; a note behind them is shown beside it until the next one."""


@contextmanager
def track(
    description: str, total: int | None = None, show: bool | None = None
) -> Iterator[Advance]:
    """Show the progress of long work of ``total`` steps; yields a function that advances by some.

    ``show``: True for a bar anywhere, False for silence. By default a bar if standard error is a
    terminal that can redraw one, and else lines: as the work begins, at least twice a minute, also
    while no step ends, and as it ends. Work within other work is noted in the lines of that. Work
    within a :func:`part` of other work has no bar: it moves that one.
    """
    around = _AROUND.get()
    if show is False:
        with _moving(_nothing):
            yield _nothing
        return
    if isinstance(around, _PartOfWork):
        within = _share_of(around, description, total)
        with _moving(within):
            yield within
        return
    if show is None and not _can_redraw():
        with _LOG.showing(_Lines(description, total)) as lines, _moving(lines):
            yield lines
        return
    from rich.console import Console

    with _bars(Console(stderr=True)) as bars:
        task = bars.add_task(description, total=total, note="")

        def advance(steps: float, note: str = "") -> None:
            bars.advance(task, steps)
            if note:
                bars.update(task, note=note)

        with _moving(advance):
            yield advance
        if len(bars.tasks) > 1:  # it was a part of other work, whose bar goes on
            bars.remove_task(task)


@contextmanager
def part(most: float, note: str = "") -> Iterator[Advance]:
    """Advance the work around the body by ``most`` of its steps, whatever the body takes.

    They are those that the yielded function receives, or the share that is done of the first work
    within the body whose total is known; the rest follows at the end. So work in several parts has
    one bar and one total. Without work around it, nothing is advanced.
    """
    around = _AROUND.get()
    this: Advance = _nothing if around is None else _PartOfWork(around, most)
    this(0, note)
    try:
        with _moving(this if around is not None else None):
            yield this
    finally:
        this(most)


@contextmanager
def whole(name: str, num_stages: int, show: bool | None = None) -> Iterator[None]:
    """Show a bar of so many stages beside that of each, and say at the end what they took."""
    took: defaultdict[str, float] = defaultdict(float)
    with track(name, num_stages, show) as advance, part(num_stages) as ended:
        before = _WHOLE.set((advance, ended, took))
        try:
            yield
        finally:
            _WHOLE.reset(before)
    total = sum(took.values())
    if show is not False and total >= SECONDS_TO_BE_SHOWN:
        for kind, seconds in sorted(took.items(), key=lambda one: -one[1]):
            print(f"{_clock(seconds)} {seconds / total:4.0%} {kind}", file=sys.stderr, flush=True)


@contextmanager
def stage(name: str, kind: str = "") -> Iterator[None]:
    """Run a stage of the whole around the body, whose seconds count as of its ``kind``."""
    advance, ended, took = _WHOLE.get() or (_nothing, _nothing, {kind or name: 0.0})
    began = time.monotonic()
    advance(0, name)
    with _moving(None):
        yield
    took[kind or name] += time.monotonic() - began
    ended(1)


@contextmanager
def _moving(work: Advance | None) -> Iterator[None]:
    """Let parts in the body move this work."""
    before = _AROUND.set(work)
    try:
        yield
    finally:
        _AROUND.reset(before)


_AROUND: ContextVar[Advance | None] = ContextVar("_AROUND", default=None)
"""What the next part would advance: the innermost work, or a part of it."""


_WHOLE: ContextVar[tuple[Advance, Advance, dict[str, float]] | None] = ContextVar(
    "_WHOLE", default=None
)
"""The bar of all stages, what moves it by no more than there are, and the seconds by kind."""


_BARS: ContextVar["Progress | None"] = ContextVar("_BARS", default=None)
"""The bars that are on the terminal; work within other work has one more."""


def _can_redraw() -> bool:
    """Whether standard error is a terminal that can; without rich, which takes long to import.

    Under bars it is a stand-in, which before rich 15 denies to be a terminal.
    """
    is_terminal = _BARS.get() is not None or sys.stderr.isatty()
    return is_terminal and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def _bars(console: "Console") -> Iterator["Progress"]:
    """Open bars on a terminal, or give those that are there."""
    from rich.progress import Progress, ProgressColumn, Task
    from rich.table import Column
    from rich.text import Text

    there = _BARS.get()
    if there is not None:
        yield there
        return

    class BarRow(ProgressColumn):
        max_refresh = None

        def render(self, task: Task) -> Text:
            left = task.time_remaining
            return Text(
                row(
                    console.width - 1,
                    task.description,
                    _count(task.completed, task.total),
                    elapsed=_clock(task.elapsed or 0),
                    eta="-:--:--" if left is None else _clock(left),
                    note=task.fields["note"],
                    share=task.completed / task.total if task.total else 0,
                )
            )

    bars = Progress(
        BarRow(table_column=Column(no_wrap=True)),
        console=console,
        refresh_per_second=4,
        speed_estimate_period=600,  # a step may take minutes
    )
    with bars:
        opened = _BARS.set(bars)
        try:
            yield bars
        finally:
            _BARS.reset(opened)


def row(
    width: int, name: str, count: str, *, elapsed: str, eta: str, note: str = "", share: float = 0
) -> str:
    """Write a bar in a row of a terminal: count and ETA always, all else as there is room."""
    end = f"{count} {elapsed} eta {eta}" if width >= _WIDE else f"{count} eta {eta}"
    end = end if count else elapsed
    name = shortened(name, max(10, width - len(end) - 1))
    left = width - len(name) - len(end) - 2
    if note and left > _WORD:
        note = shortened(note, left - 1)
        end, left = f"{end} {note}", left - len(note) - 1
    bar = min(left - 1, _LONGEST_BAR)
    if bar < _WORD or not count:
        return f"{name} {end}"
    return f"{name} {'━' * round(bar * min(share, 1)):<{bar}} {end}"


_WIDE, _WORD, _LONGEST_BAR = 60, 8, 40
"""Columns from which on a row has its time; of what is worth its place; of a bar."""


def _count(done: float, total: float | None) -> str:
    """Steps done of all; nothing where no step of an unknown number is done."""
    if not total and not done:
        return ""
    return f"{int(done + 1e-6)}/{int(total) if total else '?'}"  # parts of a step may fall short


def shortened(text: str, columns: int) -> str:
    """A text in so many columns at most."""
    return text if len(text) <= columns else f"{text[: columns - 1]}…"


@contextmanager
def track_copy(
    progress: BytesProgress | bool | None, total: int, name: str = "copy"
) -> Iterator[BytesProgress]:
    """Give a function that receives the bytes written and those in all: ``progress`` or a bar."""
    if callable(progress):
        yield progress
        return
    with track(f"{name}, MiB", total >> 20, progress) as advance:
        shown = 0

        def report(done: int, _total: int) -> None:
            nonlocal shown
            advance((done >> 20) - shown)
            shown = done >> 20

        yield report


def _nothing(_steps: float, _note: str = "") -> None:
    """Advance no bar."""


class _PartOfWork:
    """A part of other work: so many steps of that, at most."""

    def __init__(self, advance: Advance, most: float) -> None:
        self._advance, self.left = advance, most

    def __call__(self, steps: float, note: str = "") -> None:
        step = min(steps, self.left)
        self.left -= step
        self._advance(step, note)


def _share_of(around: _PartOfWork, name: str, total: float | None) -> Advance:
    """Give what advances a part of other work by the share that is done of the work within it."""
    each = around.left / (total or math.inf)
    around(0, name)

    def advance(steps: float, note: str = "") -> None:
        around(each * steps, note and f"{name}, {note}")

    return advance


def say_goes_on(where: str, show: bool | None = None) -> None:
    """Report on standard error from ``where`` interrupted work resumes, in a few words."""
    if show is not False:
        say(f"resuming: {where}")


def say(line: str) -> None:
    """Print a line on standard error now."""
    print(line, file=sys.stderr, flush=True)


class _Lines:
    """Work as a log shows it."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self._total = description, total
        self._done, self._note = 0.0, ""
        self.began = time.monotonic()
        # Times with what was done then, of the last minutes; none before the first step, by which
        # a resumed work leaps.
        self._marks: deque[tuple[float, float]] = deque(maxlen=5)
        self._first: tuple[float, float] | None = None

    def __call__(self, steps: float, note: str = "") -> None:
        self._done += steps
        self._note = note or self._note
        if steps and self._first is None:
            self._first = time.monotonic(), self._done
            self._marks.append(self._first)
        _LOG.tick()

    @property
    def beginning(self) -> str:
        """The line as the work begins."""
        of = " …" if self._total is None else f" 0/{self._total}"
        return f"{self.description}{of}"

    @property
    def reached(self) -> str:
        """How far it is, without times."""
        return f"{self.description} {_count(self._done, self._total)}".rstrip()

    def parts(self, now: float) -> list[str]:
        """How far it is, how long it took, and how long the rest will take, where that is known."""
        left = (self._total or 0) - self._done  # below 0 where an estimate was too low
        speed = self._speed(now)
        eta = [f"eta {_clock(left / speed)}"] if left >= 0 and speed and self._total else []
        if self._marks:
            self._marks.append((now, self._done))
        return [self.reached, _clock(now - self.began), *eta, self._note]

    def _speed(self, now: float) -> float | None:
        """Steps a second in the last minutes; since the first step, if there were none."""
        for mark in filter(None, (*list(self._marks)[:1], self._first)):
            if self._done > mark[1] and now > mark[0]:
                return (self._done - mark[1]) / (now - mark[0])
        return None


class _Log:
    """The lines of a log about all work of this process, the outermost first."""

    def __init__(self) -> None:
        self._lock, self._works = RLock(), list[_Lines]()
        self._said = float("-inf")
        self._ended: Event | None = None

    @contextmanager
    def showing(self, work: _Lines) -> Iterator[_Lines]:
        """Tell of work as it begins and ends, and meanwhile now and then."""
        with self._lock:
            self._works.append(work)
            if len(self._works) == 1:
                self._say(work.beginning)
                self._ended = Event()
                Thread(target=self._watch, args=(self._ended,), daemon=True).start()
        has_ended = False
        try:
            yield work
            has_ended = True
        finally:
            with self._lock:
                self._works.remove(work)
                if not self._works and self._ended is not None:
                    self._ended.set()
                if has_ended:
                    self._say_end(work)

    def _say_end(self, work: _Lines) -> None:
        now = time.monotonic()
        took = now - work.began
        if not self._works or min(took, now - self._said) >= SECONDS_TO_BE_SHOWN:
            self._say(f"{work.description} done", _clock(took))

    def _watch(self, ended: Event) -> None:
        """Look at the clock each second, for as long as there is work."""
        while not ended.wait(1.0):
            self.tick()

    def tick(self) -> None:
        """Say how far the work is, if nothing has been said for long."""
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        with self._lock:
            if self._works and now - self._said >= SECONDS_BETWEEN_LINES:
                outermost, *within = self._works
                inside = [within[-1].reached] if within else []
                self._say(*outermost.parts(now), *inside)

    def _say(self, *parts: str) -> None:
        self._said = time.monotonic()
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


_LOG = _Log()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
