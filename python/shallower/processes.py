"""The processes that work on one job, who of all writes where, and what each may use.

One process writes a place and all that lies in it. It locks the hidden sibling where its work goes
on, or the folder that it writes into, and shares the locks of all folders around. The system frees
the locks when the process dies.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from .errors import OutputError, ProcessesError, raise_output_error

try:
    import fcntl
except ImportError:  # not on Unix
    fcntl = None  # type: ignore[assignment]

_CPUINFO = Path("/proc/cpuinfo")
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

_NO_LIMIT = 1 << 60
"""Bytes from which on a limit of memory is none."""


_BEGUN, _LOAD = [0.0], [0.0]


def begin(*, timed: bool) -> None:
    """Note that a command begins; if it only forecasts, idle threads are not to spin.

    A thread that spins while another waits for a busy processor would be timed with it. OpenMP
    reads this once, as torch is imported.
    """
    _BEGUN[0] = time.thread_time()
    _LOAD[0] = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    if timed:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def worked() -> float:
    """Give the processor seconds that this thread has taken since its command began."""
    return time.thread_time() - _BEGUN[0]


def slowed(threads: int) -> tuple[float, float]:
    """Give the load as the command began, and how much longer so many threads take beside it."""
    return _LOAD[0], max(1.0, (_LOAD[0] + threads) / processors())


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
    """Refuse ``work``, with its verb, that processes cannot share: each would do all of it.

    ``spreads``: one process spreads its model over every GPU, as the error says.
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


def first_processor() -> dict[str, str]:
    """The fields of the first processor by name, as ``model name``; none where they are unknown."""
    found: dict[str, str] = {}
    try:
        with _CPUINFO.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    break
                name, _, value = line.partition(":")
                found[name.strip()] = value.strip()
    except OSError:
        return {}
    return found


def memory_limits() -> list[tuple[int, int]]:
    """The memory limits of this process, in bytes, and what each leaves; cached files may go."""
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


def requested_threads() -> int | None:
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


# Who writes where
def hidden(path: Path, suffix: str) -> Path:
    """Name a hidden sibling of a path; OutputError if the path has no name."""
    path = path.absolute()
    if not path.name:
        raise OutputError(f"cannot write {path}: it has no name")
    if "\0" in path.name:
        raise OutputError(f"cannot write {path}: embedded null byte")
    return path.with_name(f".{path.name[:200]}.{suffix}")


def partial_folder(path: Path) -> Path:
    """Name the hidden sibling where what will be ``path`` is made; OutputError if it has no name.

    Whoever makes it has locked that folder; who writes into a folder, the folder itself.
    """
    return hidden(path, "partial")


def check_alone(path: Path, *, inside: bool = False) -> None:
    """Refuse a place that another process holds, or one in it or around it: OutputError."""
    _locked(path, _real(path, inside=inside)).close()


@contextmanager
def held(path: Path, *, inside: bool = False, reserved: bool = True) -> Iterator[None]:
    """Hold a place, and all that lies in it, while the body works; the system lets go after death.

    ``inside``: files are written into that folder one by one. ``reserved``: the body may hold the
    same place once more, as a part of this work. OutputError: another process holds that place, or
    one in it or around it.
    """
    place = _real(path, inside=inside)
    with _locked(path, place, None if place in _RESERVED.get() else _made(place, inside=inside)):
        before = _RESERVED.set(_RESERVED.get() - {place} | ({place} if reserved else set()))
        ours = _OURS.set(_OURS.get() | {place, place if inside else partial_folder(place)})
        try:
            yield
        finally:
            _OURS.reset(ours)
            _RESERVED.reset(before)


_OURS: ContextVar[frozenset[Path]] = ContextVar("_OURS", default=frozenset())
"""The places that are held here, and the folders where work on them is done."""

_RESERVED: ContextVar[frozenset[Path]] = ContextVar("_RESERVED", default=frozenset())
"""Those of them that are held for one work to come."""

_LOOKED_AT = 0.2
"""Seconds for which somebody else may look whether a place is held, and so hold it."""


_Made = tuple[Path, Sequence[Path]]
"""The folder by which a place is held, and those that go again where they are empty."""


def _real(path: Path, *, inside: bool = False) -> Path:
    """A path without links, but a last one, which would be replaced."""
    with raise_output_error(path):
        if inside or Path(path).name == "..":
            return Path(os.path.realpath(path))
        folder = partial_folder(path).parent
        return Path(os.path.realpath(folder), Path(path).absolute().name)


def _made(place: Path, *, inside: bool) -> _Made:
    folder = place if inside else partial_folder(place)
    with raise_output_error(place):
        new = [one for one in (folder, *folder.parents) if not one.exists()]
    return folder, new if inside or folder in new else [folder, *new]


def _locked(path: Path, place: Path, made: _Made | None = None) -> ExitStack:
    """Lock a place, and share the locks of what lies around it; OutputError names ``path``."""
    until = time.monotonic() + _LOOKED_AT
    while True:
        with raise_output_error(path), ExitStack() as stack:
            if made is not None:
                made[0].mkdir(parents=True, exist_ok=True)
            other = _lock(stack, place, made)
            if other is None:
                return stack.pop_all()
        if time.monotonic() > until:
            around, folder = other
            raise _held_error(path, None if around == place else around, folder)
        time.sleep(0.01)


def _lock(stack: ExitStack, place: Path, made: _Made | None) -> tuple[Path, Path] | None:
    """Lock all until the stack is closed; or give the place that is held, and by which folder."""
    first, passing = (None, ()) if made is None else made
    for around, folder in sorted(_lockable(place), key=lambda one: one[1] != first):
        try:
            _lock_folder(stack, folder, is_shared=around != place, is_needed=folder == first)
        except BlockingIOError:
            return around, folder
        if folder == first:
            stack.callback(_remove_empty, passing)
    return None


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it holds results, or what the next run resumes from
            folder.rmdir()


def _lockable(place: Path) -> Iterator[tuple[Path, Path]]:
    """A place and all around it that we do not hold, each with the folders that lock it."""
    for around in (place, *place.parents):
        if around in (_RESERVED if around == place else _OURS).get():
            return
        if around.name:
            yield around, partial_folder(around)
        yield around, around


def _lock_folder(stack: ExitStack, folder: Path, *, is_shared: bool, is_needed: bool) -> None:
    """Lock a folder until the stack is closed; what is not there, or not ours to read, is not."""
    if fcntl is None:
        _lock_by_file(stack, folder, is_shared=is_shared, is_needed=is_needed)
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        if not is_needed:
            return
        raise
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # this file system knows no locks, as some that lie on a network
        return
    if is_needed and not _is_there(folder, descriptor):
        raise BlockingIOError  # the process that held it has just finished


def _is_there(folder: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    return False


def _lock_by_file(stack: ExitStack, folder: Path, *, is_shared: bool, is_needed: bool) -> None:
    """Lock a folder by a file beside it, which Windows removes when this process dies."""
    file = folder.parent / f".{folder.name}.lock"
    if is_needed:
        is_temporary = getattr(os, "O_TEMPORARY", 0)  # of Windows
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | is_temporary)
        except FileExistsError as error:
            raise BlockingIOError from error
        stack.callback(file.unlink, missing_ok=True)
        stack.callback(os.close, lock)
    elif file.exists() or (not is_shared and any(folder.rglob(".*.lock"))):
        raise BlockingIOError


def _held_error(path: Path, around: Path | None, folder: Path) -> OutputError:
    """The error of a place that another process writes to, which is named where Linux knows it."""
    who = "another process"
    with suppress(OSError, StopIteration, ValueError):
        inode = f":{folder.stat().st_ino} "
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        pid = int(next(line for line in locks if " FLOCK " in line and inode in line).split()[4])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        who = f"process {pid} ({' '.join(command.split(chr(0)))[:100].strip()})"
    return OutputError(
        f"cannot write {path}: {who} is writing {around or 'it'}; wait for it, or choose another "
        "place"
    )
