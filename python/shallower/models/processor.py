"""The processor of this machine, as the kernel describes it."""

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


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
