"""Independent units of work: which worker has which, and what follows when a worker is lost.

The driver hands out one at a time; what a worker lost or could not do goes to another. Results
depend on neither worker nor time. A unit that takes too long is done a second time: heartbeats
would not help, because a hung process may still send them.
"""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from time import monotonic
from typing import Any

from .. import errors
from ..errors import ProcessesError, ShallowerError, one_sentence

SECONDS = 1.0
"""How long an engine waits for its workers at a time."""

ATTEMPTS = 3
"""A unit is given up after so many workers failed it; a worker that failed so many units one after
the other leaves."""

MOST_DEATHS = 3
"""So many workers of a place may end before they have done anything."""

LATE, LATE_SECONDS, FIRST_SECONDS = 3, 10.0, 600.0
"""A unit is done by an idle worker too after so many times the longest that any has taken, and at
least so many seconds; after the last as long as none is done. A worker opens the work by then."""


class Ledger:
    """Which units wait, run or are done; two results of an ``exact`` unit must be equal."""

    def __init__(
        self,
        units: Iterable[str],
        done: Collection[str] = (),
        *,
        exact: bool = True,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._waiting = deque(unit for unit in units if unit not in done)
        self._given: dict[str, tuple[str, float]] = {}
        self._results: dict[str, tuple[str, str]] = {}
        self._failures: dict[str, dict[str, str]] = defaultdict(dict)
        self._given_up: dict[str, None] = {}
        self._in_a_row: Counter[str] = Counter()
        self._places: dict[str, Hashable] = {}
        self._proven: set[Hashable] = set()
        self._longest = 0.0
        self._exact, self._clock = exact, clock

    @property
    def is_settled(self) -> bool:
        """Whether every unit is done or given up."""
        return not self._waiting and not self._being_done

    @property
    def _being_done(self) -> dict[str, tuple[str, float]]:
        """The units that are given and have no result, with who has each last, and since when."""
        given = sorted(self._given.items(), key=lambda item: item[1][1])
        last = {unit: (worker, since) for worker, (unit, since) in given}
        ended = {*self._results, *self._given_up}
        return {unit: one for unit, one in last.items() if unit not in ended}

    @property
    def _late(self) -> dict[str, tuple[str, float]]:
        """The units that have been given for too long, each with who has it, and the seconds."""
        patience = max(LATE_SECONDS, LATE * self._longest) if self._proven else FIRST_SECONDS
        now = self._clock()
        found = {unit: (worker, now - since) for unit, (worker, since) in self._being_done.items()}
        return {unit: one for unit, one in found.items() if one[1] > patience}

    @property
    def given_up(self) -> dict[str, list[str]]:
        """The errors of the units that failed too often."""
        return {
            unit: [*self._failures[unit].values()]
            for unit in self._given_up
            if unit not in self._results
        }

    def take(self, worker: str, place: Hashable = None) -> str | None:
        """Give a worker a unit that it has not failed, the next or a late one; None if none is.

        What fails at a ``place`` where nothing was ever done says little of the unit.
        """
        self._places[worker] = worker if place is None else place
        late = self._late
        units = (unit for unit in (*self._waiting, *late) if worker not in self._failures[unit])
        if (unit := next(units, None)) is None:
            return None
        if unit in late:
            other, seconds = late[unit]
            _say(f"{other} has been at {unit} for {seconds:.0f} s: {worker} does it too")
        else:
            self._waiting.remove(unit)
        self._given[worker] = unit, self._clock()
        return unit

    def finish(self, worker: str, unit: str, content: bytes) -> bool:
        """Note the result of a unit; False if it was there before.

        ProcessesError: it was there before, and was another one.
        """
        if self._given.get(worker, ("", 0.0))[0] == unit:
            _, since = self._given.pop(worker)
            if unit not in self._results:
                self._longest = max(self._longest, self._clock() - since)
        self._proven.add(self._places.get(worker, worker))
        self._in_a_row[worker] = 0
        digest = hashlib.sha256(content).hexdigest()
        if unit in self._results:
            before, other = self._results[unit]
            if self._exact and before != digest:
                raise ProcessesError(
                    f"{other} and {worker} found different results of {unit}: their machines or "
                    f"packages differ"
                )
            return False
        self._results[unit] = digest, worker
        if unit in self._waiting:
            self._waiting.remove(unit)
        return True

    def fail(self, worker: str, error: str) -> bool:
        """Note that a worker was lost, or could not do what it had; whether it only fails.

        The unit goes back, unless too many failed it at places where others were done.
        """
        unit, _ = self._given.pop(worker, (None, 0))
        if unit is None:
            return False
        self._in_a_row[worker] += 1
        self._failures[unit][worker] = f"{error} (on {worker})"
        if unit not in {*self._results, *self._given_up, *self._being_done}:
            if self._proven_failures(unit) < ATTEMPTS:
                self._waiting.append(unit)
            else:
                self._given_up[unit] = None
        return self._in_a_row[worker] >= ATTEMPTS

    def stuck(self, idle: Iterable[str]) -> list[str] | None:
        """The idle workers that fresh ones are to replace, as nobody here can do what is left.

        None where that is not so. What failed too often by then is given up.
        """
        late = self._late
        if {*self._being_done} - {*late}:
            return None
        most = ATTEMPTS**2 if self._proven else ATTEMPTS
        failed = {unit: len(self._failures[unit]) for unit in (*self._waiting, *late)}
        for unit, times in failed.items():
            if self._proven_failures(unit) >= ATTEMPTS or (times >= most and not late):
                self._given_up[unit] = None
        self._waiting = deque(unit for unit in self._waiting if unit not in self._given_up)
        count = sum(times < most for unit, times in failed.items() if unit not in self._given_up)
        useful_first = sorted(idle, key=lambda one: (self._places[one] not in self._proven, one))
        return useful_first[:count] if count else None

    def _proven_failures(self, unit: str) -> int:
        """The failures of a unit at places where another was done."""
        return sum(self._places[worker] in self._proven for worker in self._failures[unit])


Message = tuple[str, Any]
"""``ready`` with what was opened, ``refused`` with the kind and the text of an error, ``done`` with
a unit and its result, ``failed`` with a unit and an error."""


@dataclass(frozen=True, slots=True)
class Job:
    """Work that falls into units, as it is sent to workers: plain JSON values.

    Attributes:
        opener: the function that opens it, as ``module:name`` in this package or the driver's.
        described: its argument.
    """

    opener: str
    described: Mapping[str, Any]

    @property
    def device_map(self) -> Any:
        """Where its model goes, as :class:`ModelSource` takes it."""
        return self.described.get("source", {}).get("device_map")


class Worker:
    """What a worker does, in whatever process it is."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._opened: Any = None  # it says hello, and runs a unit

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
    """Workers, wherever they are; a context manager that starts and stops them.

    Each has a place, which has room for some; ``count`` are started at most, if it is given.
    """

    clock = staticmethod(monotonic)

    def __init__(self, job: Job, count: int | None = None) -> None:
        self.job, self.count = job, count
        self.places: dict[str, Hashable] = {}
        self._reached: dict[str, str] = {}
        self._left: Counter[Hashable] = Counter()
        self._deaths: Counter[Hashable] = Counter()
        self._closed: dict[Hashable, ShallowerError] = {}
        self._begun: dict[str, float] = {}

    def __enter__(self) -> "Engine":
        try:
            self.fill()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all workers."""
        for worker in [*self.places]:
            self.end(worker)

    @abstractmethod
    def room(self) -> Mapping[Any, int]:
        """How many workers each place has room for."""

    @abstractmethod
    def start(self, place: Any, number: int) -> str:
        """Start a worker at a place; its name, which says which of all it is."""

    @abstractmethod
    def kill(self, worker: str) -> None:
        """End a worker, whatever it does."""

    @abstractmethod
    def give(self, worker: str, unit: str) -> None:
        """Let a worker do a unit."""

    @abstractmethod
    def events(self) -> list[Event]:
        """Wait a little for what workers say."""

    @property
    def nobody(self) -> ShallowerError:
        """Say why no worker can be started."""
        return ProcessesError("there is room for no worker")

    def fill(self) -> None:
        """Start as many workers as there is room for, and were asked for.

        Those that left are replaced only where nobody else can do what waits. ProcessesError, or
        what the first of them refused the work with: there can be none.
        """
        if not self.places:
            self._left.clear()
        has = self._left + Counter(self.places.values())
        for place, room in self.room().items():
            for _ in range(0 if place in self._closed else room - has[place]):
                if self.count is None or len(self.places) < self.count:
                    worker = self.start(place, len(self._begun))
                    self.places[worker], self._begun[worker] = place, self.clock()
        if not self.places:
            raise next(iter(self._closed.values()), self.nobody)

    def end(self, worker: str) -> Any:
        """End a worker, and forget it; its place."""
        self.kill(worker)
        return self.places.pop(worker)

    @property
    def is_starting(self) -> bool:
        """Whether a worker may soon have opened the work."""
        opening = [self._begun[worker] for worker in self.places if worker not in self._reached]
        return any(self.clock() - begun < FIRST_SECONDS for begun in opening)

    def renew(self, workers: Collection[str]) -> None:
        """Let fresh workers take the place of some; of those that left where these are none."""
        for worker in workers:
            self.end(worker)
        if not workers:
            self._left.clear()

    def note(self, event: Event) -> None:
        """Note how far a worker came: that it was ``ready``, or has ``done`` something."""
        if event.kind in ("ready", "done"):
            self._reached[event.worker] = event.kind

    def lose(self, worker: str, how: str) -> None:
        """Forget a worker that ended; replace none at a place where they only end."""
        place, reached = self.end(worker), self._reached.get(worker)
        _say(f"{worker} was lost: {how}")
        self._deaths[place] += reached != "done"
        if self._deaths[place] < MOST_DEATHS:
            return
        if reached:
            self._deaths[place] = 0
            self._left[place] += 1
        else:
            self._closed[place] = ProcessesError(
                f"no worker came to work: {how}; start fewer (--workers)"
            )

    def leave(self, worker: str, error: str) -> None:
        """Go on without a worker that only fails."""
        self._left[self.end(worker)] += 1
        _say(f"{worker} takes no more part: {ATTEMPTS} in a row failed, the last by {error}")

    def refuse(self, worker: str, error: ShallowerError) -> None:
        """Use no more workers at the place of one that refuses the work."""
        self._closed[self.end(worker)] = error
        _say(f"{worker} takes no part: {error}")


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
                engine.note(event)
                if event.kind == "ready":
                    ready(event.worker, event.value)
                elif event.kind == "done":
                    unit, content = event.value
                    if ledger.finish(event.worker, unit, content):
                        accept(unit, content)
                else:
                    _without(engine, ledger, event)
            idle &= {*engine.places}
            for worker in sorted(idle):
                if (next_unit := ledger.take(worker, engine.places[worker])) is not None:
                    idle.discard(worker)
                    engine.give(worker, next_unit)
            if not engine.is_starting and (stuck := ledger.stuck(idle)) is not None:
                engine.renew(stuck)
            if not ledger.is_settled:
                engine.fill()


def _without(engine: Engine, ledger: Ledger, event: Event) -> None:
    """Go on without what failed, or without a worker that was lost, or refuses the work."""
    if event.kind == "refused":
        kind, text = event.value
        engine.refuse(event.worker, getattr(errors, kind, ProcessesError)(text))
    elif event.kind == "lost":
        ledger.fail(event.worker, event.value)
        engine.lose(event.worker, event.value)
    elif ledger.fail(event.worker, event.value[1]):
        engine.leave(event.worker, event.value[1])


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
