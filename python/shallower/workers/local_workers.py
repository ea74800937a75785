"""Workers that are processes of this machine; a dead one is found here, ``units.py`` acts on it."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from .units import SECONDS, Engine, Event, Job, Worker

LAST_SECONDS = 2.0
"""How long a worker may take to see that there is no more work, before it is ended."""


@dataclass(frozen=True, slots=True)
class Seat:
    """What a worker has for itself: threads, and the GPUs that it sees; all where that is None."""

    threads: int
    cards: str | None = None


class LocalWorkers(Engine):
    """Processes that are started anew (spawn), so that none inherits threads or a device."""

    processes: Any = multiprocessing.get_context("spawn")

    def __init__(self, job: Job, seats: Sequence[Seat]) -> None:
        super().__init__(job)
        self.seats = seats
        self._workers: dict[str, tuple[Any, Any]] = {}

    def __exit__(self, *_: object) -> None:
        for _, connection in self._workers.values():
            connection.close()
        for process, _ in self._workers.values():
            process.join(LAST_SECONDS)
        super().__exit__()

    def room(self) -> Mapping[int, int]:
        """One worker a seat."""
        return dict.fromkeys(range(len(self.seats)), 1)

    def start(self, place: int, number: int) -> str:
        """Start a process at a seat."""
        seat = self.seats[place]
        ours, theirs = self.processes.Pipe()
        process = self.processes.Process(target=_serve, args=(theirs, self.job), daemon=True)
        cards = {} if seat.cards is None else {"CUDA_VISIBLE_DEVICES": seat.cards}
        with _environment({"OMP_NUM_THREADS": str(seat.threads), **cards}):
            process.start()
        theirs.close()
        name = f"worker {number}" + (f" on GPU {seat.cards}" if seat.cards else "")
        self._workers[name] = process, ours
        return name

    def give(self, worker: str, unit: str) -> None:
        """Send a unit; a worker that is dead is found by :meth:`events`."""
        with suppress(OSError):
            self._workers[worker][1].send(unit)

    def events(self) -> list[Event]:
        """Wait for messages and deaths."""
        waiting = wait([connection for _, connection in self._workers.values()], SECONDS)
        named = [name for name, (_, connection) in self._workers.items() if connection in waiting]
        return [self._event_of(worker) for worker in named]

    def _event_of(self, worker: str) -> Event:
        process, connection = self._workers[worker]
        try:
            return Event(worker, *connection.recv())
        except (EOFError, OSError):
            process.join()
        how = f"the process ended with exit code {process.exitcode}"
        if process.exitcode and process.exitcode < 0:
            how = f"the process was ended by {signal.Signals(-process.exitcode).name}"
        return Event(worker, "lost", how)

    def kill(self, worker: str) -> None:
        """End a process, also one that is stopped; it may end what it has begun."""
        process, connection = self._workers.pop(worker)
        connection.close()
        process.terminate()
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGCONT)
        process.join(LAST_SECONDS)
        process.kill()
        process.join()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables, for what is started in the body."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _end_with_driver() -> None:
    """End this process when the one that started it is gone, whatever is being done."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    wait([driver.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(connection: Any, job: Job) -> None:
    """Work until the one who drives has no more, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it goes to all; the driver ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that what a unit began is ended
    Thread(target=_end_with_driver, daemon=True).start()
    worker = Worker(job)
    try:
        connection.send(worker.open())
        while True:
            connection.send(worker.run(connection.recv()))
    except (EOFError, OSError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to end
