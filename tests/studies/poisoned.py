"""Real work for workers, of which some ends badly."""

import os
import signal
from pathlib import Path

from shallower.sharing.eval_shards import OpenedEval
from shallower.sharing.scan_shards import OpenedScan
from shallower.sharing.study_units import OpenedStudy


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
