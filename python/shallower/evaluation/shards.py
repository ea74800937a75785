"""A measurement shared among the processes of a torch.distributed group."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from ..errors import ModelError

Share = TypeVar("Share")


def rank_and_size(shared: bool) -> tuple[int, int]:
    """Find this process's place among those that share a measurement.

    Args:
        shared: whether there may be others; all of the group must say the same.

    Returns:
        Its rank and their number; 0 and 1 where it measures alone, or where no group was made.
    """
    if shared and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(measure: Callable[[], Share], size: int) -> list[Share]:
    """Do this process's share, and wait for those of the others.

    Args:
        measure: gives this process's share, which must be picklable.
        size: how many processes share the measurement.

    Returns:
        The shares by rank, the same in all processes.

    Raises:
        Exception: what was raised in this process; else what the first of the others raised, so
            that none waits for one that failed.
    """
    if size == 1:
        return [measure()]
    share, error = None, None
    try:
        share = measure()
    except Exception as raised:
        error = raised
    shares: list[Any] = [None] * size
    distributed.all_gather_object(shares, (share, _picklable(error)))
    if error is not None:
        raise error
    for _, other in shares:
        if other is not None:
            raise other
    return [share for share, _ in shares]


def _picklable(error: Exception | None) -> Exception | None:
    """The error, or one that says the same, that another process can read."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        name = type(error).__name__
        return ModelError(f"another process could not measure its share: {name}: {error}")
    return error
