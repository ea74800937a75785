"""Workers that are processes of this machine."""

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from ..errors import ProcessesError
from .units import SECONDS, Engine, Event, Job, Worker

LAST_SECONDS = 2.0
"""How long a worker may take to see that there is no more work, before it is ended."""

MOST_DEATHS = 3
"""So many workers may end before they are ready."""


class LocalWorkers(Engine):
    """Processes that are started anew (spawn), so that none inherits threads or a device."""

    def __init__(self, job: Job, count: int) -> None:
        self._job, self._count = job, count
        self._workers: dict[str, tuple[Any, Any]] = {}
        self._ready: set[str] = set()
        self._started = self._deaths = 0

    def __enter__(self) -> "LocalWorkers":
        for _ in range(self._count):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        for _, connection in self._workers.values():
            connection.close()
        for process, _ in self._workers.values():
            process.join(LAST_SECONDS)
            process.terminate()
            process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process: Any = context.Process(target=_serve, args=(theirs, self._job), daemon=True)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(self._job.threads)
        try:
            process.start()
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        self._workers[f"worker {self._started}"] = process, ours
        self._started += 1

    def give(self, worker: str, unit: str) -> None:
        """Send a unit; a worker that is dead is found by :meth:`events`."""
        with suppress(OSError):
            self._workers[worker][1].send(unit)

    def events(self) -> list[Event]:
        """Wait for messages and deaths."""
        waiting = wait([connection for _, connection in self._workers.values()], SECONDS)
        named = [name for name, (_, connection) in self._workers.items() if connection in waiting]
        return [self._heard(worker) for worker in named]

    def _heard(self, worker: str) -> Event:
        try:
            event = Event(worker, *self._workers[worker][1].recv())
        except (EOFError, OSError):
            return Event(worker, "lost", self._lose(worker))
        self._ready.add(worker)
        return event

    def _lose(self, worker: str) -> str:
        """Replace a worker that died; how it ended."""
        process, connection = self._workers.pop(worker)
        connection.close()
        process.join()
        how = f"the process ended with exit code {process.exitcode}"
        if process.exitcode and process.exitcode < 0:
            how = f"the process was ended by {signal.Signals(-process.exitcode).name}"
        if worker not in self._ready:
            self._deaths += 1
            if self._deaths >= MOST_DEATHS:
                raise ProcessesError(f"no worker came to work: {how}; start fewer (--workers)")
        self._start()
        return how


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
        return
