"""Real work for workers, of which some ends badly."""

import os
import signal
from pathlib import Path

from shallower.sharing.share import open_work


def poisoned(described):
    """A scan or an eval of which no worker can make the tenth shard."""

    def fail():
        raise ValueError("poison")

    return _before(open_work(described), "9/64", fail)


def dying(described):
    """A comparison whose greedy search ends its worker as often as DEATHS says, beside a file."""

    def end():
        place, _, times = os.environ["DEATHS"].rpartition(":")
        died = len(Path(place).read_text()) if Path(place).exists() else 0
        if died < int(times):
            Path(place).write_text("x" * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)

    return _before(open_work(described), "greedy of", end)


def _before(opened, unit, happens):
    """An opened work to which something happens before some unit."""
    run = opened.run

    def run_or_end(name):
        if name.startswith(unit):
            happens()
        return run(name)

    opened.run = run_or_end
    return opened
