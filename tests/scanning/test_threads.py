"""Threads of the core: they belong to the work, not to the scan."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

import shallower as sh
from shallower import ThreadsError
from shallower._core import Threads
from shallower.scanning.builder import ScanBuilder

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads in /proc")


def tasks():
    """The threads of this process, by their numbers."""
    return {path.name for path in TASKS.iterdir()}


def ended(before):
    """Whether no thread is left but those from before; those that end take a moment."""
    deadline = time.monotonic() + 10
    while tasks() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    return not tasks() - before


def states():
    return np.random.default_rng(0).standard_normal((20, 6, 16)).cumsum(axis=1)


def test_a_builder_has_threads_and_a_scan_has_none():
    before = tasks()
    builder = ScanBuilder(6, ["angular"], threads=3, cka_batch=8)
    assert len(tasks() - before) == 3
    builder.add(states(), range(20))
    assert len(tasks() - before) == 3
    scan = builder.finish()
    del builder
    assert ended(before)
    assert scan.best_block(2).stop


def test_what_is_done_with_a_scan_starts_no_thread(tmp_path, monkeypatch):
    scan = sh.analyse_states(states(), cka_batch=8, keep_samples=True)
    scan.save(tmp_path / "scan")
    began = []
    start = threading.Thread.start

    def watched(thread):
        began.append(thread)
        start(thread)

    before = tasks()
    monkeypatch.setattr(threading.Thread, "start", watched)
    back = sh.Scan.load(tmp_path / "scan")
    assert not tasks() - before
    merged = sh.Scan.merge([back, scan])
    merged.save(tmp_path / "merged")
    merged.best_plan(3, 2)
    sh.Costs.of_blocks(merged.mean(), metric="angular").plan(2)
    assert merged.cka.shape == (6, 6)
    assert not tasks() - before
    assert not began
    back.bootstrap(50, threads=2)
    assert ended(before)


@pytest.mark.parametrize("threads", [0, -1, 4097, 10**30, 1.5, "2"])
def test_numbers_of_threads_that_cannot_be_are_refused(threads):
    for ask in (
        lambda: Threads(threads),
        lambda: sh.analyse_states(states(), threads=threads),
        lambda: sh.analyse_states(states(), keep_samples=True).bootstrap(threads=threads),
    ):
        with pytest.raises(ThreadsError, match="threads must be 1 to 4096"):
            ask()
