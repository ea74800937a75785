"""The memory that work takes at its peak in this process: as Linux tells it, or as torch does."""

import ctypes
import gc
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile

REFS = Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""
needs_linux = pytest.mark.skipif(not REFS.exists(), reason="peaks are read as Linux tells them")


def resident(key):
    """Bytes of this process in memory, now (`VmRSS`, `RssAnon`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of(work):
    """Bytes that work takes at its peak, above what the process holds before it."""
    allocator = ctypes.CDLL(None)
    gc.collect()
    allocator.malloc_trim(0)  # so that what was freed before hides nothing
    allocator.mallopt(_MMAP_THRESHOLD, 1 << 18)  # so that what is freed meanwhile is given back
    try:
        REFS.write_text("5", encoding="utf-8")  # the peak so far is forgotten
        before = resident("VmRSS")
        work()
        return resident("VmHWM") - before
    finally:
        allocator.mallopt(_MMAP_THRESHOLD, 32 << 20)  # where it goes by itself


def tensors_peak(work):
    """Bytes that the tensors of work on a CPU take at its peak, whatever the process held before.

    What linear algebra keeps for itself isn't in it: it differs by processor and by what ran.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
