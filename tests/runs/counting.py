"""Work for workers that needs no model: a unit is a number, its result the number's square."""

import errno
import os
import signal
import time
from pathlib import Path

from shallower.errors import TextsError
from shallower.runs.eval_shards import OpenedEval
from shallower.runs.scan_shards import OpenedScan
from shallower.runs.study_units import OpenedStudy
from shallower.runs.units import Job

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


class _Poisoned:
    """Shards of which no worker can make the eighth."""

    def run(self, unit):
        """A shard, or an error."""
        if unit == "7/64":
            raise ValueError("poison")
        return super().run(unit)


class PoisonedScan(_Poisoned, OpenedScan):
    """A scan."""


class PoisonedEval(_Poisoned, OpenedEval):
    """An evaluation."""


def done_in(folder):
    """The units that were begun, in their order, and the processes that did."""
    lines = (folder / "done").read_text().splitlines()
    return [tuple(line.split()) for line in lines]


class DyingStudy(OpenedStudy):
    """A comparison whose greedy search ends its worker as often as DEATHS says, beside a file."""

    def run(self, unit):
        """A part, or the end."""
        place, _, times = os.environ["DEATHS"].rpartition(":")
        died = len(Path(place).read_text()) if Path(place).exists() else 0
        if unit.startswith("greedy of") and died < int(times):
            Path(place).write_text("x" * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(unit)
