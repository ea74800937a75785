"""The processes that work on one job, and the one of them that writes."""

import os

from .errors import ProcessesError


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
