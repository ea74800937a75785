"""Independent units of work, done by several processes or machines: who has which, what was lost.

The one who drives hands out a unit at a time, so that the slow take fewer. What a worker had when
it was lost goes back; nothing that comes out depends on who did what, or when.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from .. import errors
from ..errors import ProcessesError, ShallowerError, one_sentence

SECONDS = 1.0
"""How long an engine waits for its workers at a time."""

ATTEMPTS = 3
"""A unit that failed so often is given up."""


class Ledger:
    """Which units wait, which are being done, what came of them."""

    def __init__(self, units: Iterable[str], done: Collection[str] = ()) -> None:
        self._waiting = deque(unit for unit in units if unit not in done)
        self._given: dict[str, str] = {}
        self._results: dict[str, tuple[str, str]] = {}
        self._failures: dict[str, list[str]] = defaultdict(list)

    @property
    def is_settled(self) -> bool:
        """Whether every unit is done or given up."""
        return not self._waiting and not self._given

    @property
    def given_up(self) -> dict[str, list[str]]:
        """The errors of the units that failed too often."""
        return {
            unit: failures
            for unit, failures in self._failures.items()
            if len(failures) >= ATTEMPTS and unit not in self._results
        }

    def take(self, worker: str) -> str | None:
        """Give a worker the next unit; None if none waits."""
        if not self._waiting:
            return None
        self._given[worker] = self._waiting.popleft()
        return self._given[worker]

    def finish(self, worker: str, unit: str, content: bytes) -> bool:
        """Note the result of a unit; False if it was there before.

        ProcessesError: it was there before, and was another one.
        """
        if self._given.get(worker) == unit:
            del self._given[worker]
        digest = hashlib.sha256(content).hexdigest()
        if unit in self._results:
            before, other = self._results[unit]
            if before != digest:
                raise ProcessesError(
                    f"{other} and {worker} found different results of {unit}: their machines or "
                    f"packages differ"
                )
            return False
        self._results[unit] = digest, worker
        if unit in self._waiting:
            self._waiting.remove(unit)
        return True

    def fail(self, worker: str, error: str) -> None:
        """Note that a worker was lost, or could not do what it had: that goes back."""
        unit = self._given.pop(worker, None)
        if unit is None or unit in self._results:
            return
        self._failures[unit].append(error)
        if len(self._failures[unit]) < ATTEMPTS:
            self._waiting.append(unit)


class Opened(Protocol):
    """Work that a worker has opened: what it is of, and its units."""

    hello: Mapping[str, Any]

    def run(self, unit: str) -> bytes:
        """Do one unit."""


Message = tuple[str, Any]
"""``ready`` with what was opened, ``refused`` with the kind and the text of an error, ``done`` with
a unit and its result, ``failed`` with a unit and an error."""


@dataclass(frozen=True, slots=True)
class Job:
    """Work that falls into units, as it is sent to workers: plain JSON values.

    Attributes:
        opener: the function that opens it, as ``module:name`` in this package or the driver's.
        described: its argument.
        threads: threads of a worker.
    """

    opener: str
    described: Mapping[str, Any]
    threads: int


def threads_of(workers: int | None) -> int:
    """The threads of each of some workers: ``OMP_NUM_THREADS``, or their share of this machine."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else max(1, (os.cpu_count() or 1) // (workers or 1))


class Worker:
    """What a worker does, in whatever process it is."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._opened: Opened | None = None

    def open(self) -> Message:
        """Open the work, or refuse it."""
        module, _, name = self._job.opener.partition(":")
        try:
            self._opened = getattr(import_module(module), name)(dict(self._job.described))
        except ShallowerError as error:
            return "refused", (type(error).__name__, str(error))
        except Exception as error:
            return "refused", (ProcessesError.__name__, one_sentence(error))
        return "ready", dict(self._opened.hello)

    def run(self, unit: str) -> Message:
        """Do a unit, and give its result or its error."""
        assert self._opened is not None
        try:
            return "done", (unit, self._opened.run(unit))
        except Exception as error:
            return "failed", (unit, one_sentence(error))


@dataclass(frozen=True, slots=True)
class Event:
    """What a worker says, or that it is ``lost``, and why."""

    worker: str
    kind: str
    value: Any


class Engine(ABC):
    """Workers, wherever they are; a context manager that starts and stops them."""

    @abstractmethod
    def __enter__(self) -> "Engine":
        """Start workers; ProcessesError if there can be none."""

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Stop all workers."""

    @abstractmethod
    def give(self, worker: str, unit: str) -> None:
        """Let a worker do a unit."""

    @abstractmethod
    def events(self) -> list[Event]:
        """Wait a little for what workers say; workers that were lost are replaced."""

    def refuse(self, _worker: str, error: ShallowerError) -> None:
        """Go on without a worker that cannot do the work; by default none could: raise."""
        raise error


def drive(
    engine: Engine,
    ledger: Ledger,
    accept: Callable[[str, bytes], None],
    *,
    ready: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Let workers do all units.

    Args:
        engine: the workers.
        ledger: the units.
        accept: keeps the result of a unit, which comes once.
        ready: looks at what a worker has opened.
    """
    idle: set[str] = set()
    with engine:
        while not ledger.is_settled:
            for event in engine.events():
                idle.add(event.worker)
                if event.kind == "ready":
                    ready(event.worker, event.value)
                elif event.kind == "done":
                    unit, content = event.value
                    if ledger.finish(event.worker, unit, content):
                        accept(unit, content)
                elif event.kind == "failed":
                    ledger.fail(event.worker, f"{event.value[1]} (on {event.worker})")
                else:
                    idle.discard(event.worker)
                    _without(engine, ledger, event)
            for worker in sorted(idle):
                if (next_unit := ledger.take(worker)) is not None:
                    idle.discard(worker)
                    engine.give(worker, next_unit)


def _without(engine: Engine, ledger: Ledger, event: Event) -> None:
    """Go on without a worker that was lost, or that refuses the work."""
    if event.kind == "lost":
        ledger.fail(event.worker, f"{event.value} (on {event.worker})")
    else:
        kind, text = event.value
        engine.refuse(event.worker, getattr(errors, kind, ProcessesError)(text))
