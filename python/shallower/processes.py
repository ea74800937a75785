"""The processes that work on one job, the one of them that writes, and what each may use."""

import os
from collections.abc import Iterator
from pathlib import Path

from .errors import ProcessesError

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

_NO_LIMIT = 1 << 60
"""Bytes from which on a limit of memory is none."""


def num_processes() -> int:
    """Count the processes that train together, as torchrun or accelerate started them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Say whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Find the number of this process among those of its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def refuse_several(work: str = "scans are", *, spreads: bool = True) -> None:
    """Refuse work that processes cannot share: each would do all of it, into one place.

    Args:
        work: the work and its verb, for the error.
        spreads: whether one process spreads its model over every GPU.

    Raises:
        ProcessesError: this is one of several processes.
    """
    if num_processes() > 1:
        one = "; it uses every GPU (--device-map auto)" if spreads else ""
        raise ProcessesError(f"{work} not shared among processes yet: start one process{one}")


def processors() -> int:
    """Count the processors that this process may use: its affinity, and a container's quota."""
    known = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    found = [len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1]
    for group in _cgroups():
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            quota = _numbers(group, *names)
            found += [max(1, quota[0] // quota[1])] if quota and quota[0] > 0 else []
    return min(found)


def memory_limits() -> list[tuple[int, int]]:
    """The limits of memory that this process is under, in bytes, and those that each leaves.

    Files that are cached can be let go.
    """
    found = []
    for group in _cgroups():
        for prefix, *names in (
            ("inactive_file ", "memory.max", "memory.current"),
            ("total_inactive_file ", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            numbers = _numbers(group, *names)
            if numbers and numbers[0] < _NO_LIMIT:
                found.append((numbers[0], numbers[0] - numbers[1] + _cached(group, prefix)))
    return found


def asked_threads() -> int | None:
    """The threads of a process that ``OMP_NUM_THREADS`` names; None where it names none."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return (int(asked) if asked.isdecimal() else 0) or None


def _cached(group: Path, prefix: str) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(prefix))


def _cgroups() -> Iterator[Path]:
    """The folders of the control groups that this process is in, from each group upwards."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in dict.fromkeys(["0::/", *lines]):
        _, kinds, own = line.split(":", 2)
        for kind in kinds.split(","):
            top = _CGROUPS / kind
            place = top / own.lstrip("/")
            yield from (place, *(one for one in place.parents if one.is_relative_to(top)))


def _numbers(group: Path, *names: str) -> list[int]:
    """The numbers in files of a control group; empty where one is not there, or says ``max``."""
    try:
        return [int(word) for name in names for word in (group / name).read_text().split()]
    except (OSError, ValueError):
        return []
