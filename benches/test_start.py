"""The start of the program: CPU time of `shallower --help` against that of `python -c pass`.

The least of interleaved runs counts; what a run costs above that is other programs' doing.
"""

import resource
import subprocess
import sys

import pytest

RUNS = 12
MOST = 4.0
"""Times `python -c pass` that the help may take."""


def cpu_seconds(*arguments):
    """User and system seconds of a Python process that succeeds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_start(benchmark, command):
    ours, bare = [], []
    for _ in range(RUNS):
        bare.append(cpu_seconds("-c", "pass"))
        ours.append(cpu_seconds("-m", "shallower", command))
    benchmark.extra_info["ratio"] = min(ours) / min(bare)
    assert min(ours) <= MOST * min(bare), (min(ours), min(bare))
    benchmark.pedantic(cpu_seconds, ("-m", "shallower", command), rounds=RUNS)
