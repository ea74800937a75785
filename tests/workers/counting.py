"""Work for workers that needs no model: a unit is a number, its result the number's square.

Every worker imports this anew, so it imports no torch.
"""

import errno
import os
import signal
import time
from pathlib import Path

from shallower.errors import TextsError
from shallower.workers.units import Job

OPENER = f"{__name__}:Counting"


def job_of(folder, **described):
    """A job whose workers write into a folder what they do."""
    return Job(OPENER, {"folder": str(folder), **described})


def _raise():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/part")


def _stop():
    os.kill(os.getpid(), signal.SIGSTOP)
    return b"another"


_SICK = {"raises": _raise, "stops": _stop, "dies": lambda: os.kill(os.getpid(), signal.SIGKILL)}
"""What happens in a process that is sick."""


class Counting:
    """What ``described`` says happens to its units."""

    def __init__(self, described):
        self._folder, self._described = Path(described["folder"]), described
        if described.get("dies_opening"):
            os.kill(os.getpid(), signal.SIGKILL)
        if refusal := described.get("refuses"):
            raise TextsError(refusal)
        if described.get("sick") == "refuses" and self._first("opened"):
            raise TextsError("there are none")
        self.hello = {"process": os.getpid()}

    def run(self, unit):
        """The square of a number."""
        with (self._folder / "done").open("a") as file:
            file.write(f"{unit} {os.getpid()}\n")
        if unit == self._described.get("poison"):
            raise ValueError("poison")
        if self._described.get("sick") in _SICK and self._is_sick():
            return _SICK[self._described["sick"]]()
        if unit == self._described.get("kills_once") and self._first(unit):
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == self._described.get("waits_once") and self._first(unit):
            time.sleep(600)
        needed = self._described.get("at", 1) if int(unit) >= self._described.get("since", 0) else 1
        while len({process for _, process in done_in(self._folder)}) < needed:
            time.sleep(0.05)  # until so many processes are at work
        time.sleep(self._described.get("seconds", 0))
        if self._described.get("shows"):
            threads, cards = os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]
            return f"{threads} threads, GPUs {cards}".encode()
        return str(int(unit) ** 2).encode()

    def _is_sick(self):
        """Whether this process is the first that did anything."""
        return done_in(self._folder)[0][1] == str(os.getpid())

    def _first(self, unit):
        """Whether no process was here before."""
        try:
            (self._folder / f"first-{unit}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def done_in(folder):
    """The units that were begun, in their order, and the processes that did."""
    lines = (folder / "done").read_text().splitlines()
    return [tuple(line.split()) for line in lines]
