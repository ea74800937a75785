"""The processes that train together: their group, and what all of them agree on.

The main process decides whatever depends on files, clocks or free memory, so that all processes
take the same steps. Each has one GPU with the whole model; nothing else is shared yet.
"""

import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import ProcessesError
from ..processes import is_main_process, local_rank, num_processes

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long processes wait for one another; torchrun ends all others when one of them ends."""

SECONDS_TO_BE_ENDED = 10.0

_GROUPS = itertools.count()
"""The groups of these processes, one a healing."""

_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""Words of what torch raises in a process that has lost another one."""


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that train for the body, and part again; of one process, do nothing.

    All of them must leave the body by the same way. What is written afterwards, one writes alone,
    and the others need not wait for it.
    """
    if num_processes() == 1 or distributed.is_initialized():
        yield
        return
    try:
        _join(_store())
        distributed.barrier()
        yield
        distributed.barrier()
    except RuntimeError as error:
        if not _is_about_the_others(error):
            raise
        time.sleep(SECONDS_TO_BE_ENDED)  # so that the last words are those of the one that failed
        raise ProcessesError(
            "another of the processes that train together ended: its error says why"
        ) from error
    distributed.destroy_process_group()


def _join(store: Store) -> None:
    """Begin a group; its addresses are not those of an earlier one of these processes."""
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"healing {next(_GROUPS)}", store),
        rank=int(os.environ["RANK"]),
        world_size=num_processes(),
        timeout=PATIENCE,
    )


@cache
def _store() -> Store:
    """The store by which these processes find one another."""
    try:
        store: Store = next(rendezvous("env://", timeout=PATIENCE))[0]
    except ValueError as error:
        raise ProcessesError(
            f"this should be one of {num_processes()} processes, as WORLD_SIZE says, and cannot "
            f"find the others: {error}. Start them by torchrun"
        ) from error
    return store


def _is_about_the_others(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in _LOST)


def agree(decide: Callable[[], T]) -> T:
    """Let the main process decide, by a picklable result, what depends on files or clocks."""
    if not distributed.is_initialized():
        return decide()
    decided: list[Any] = [decide() if is_main_process() else None]
    distributed.broadcast_object_list(decided, src=0)
    value: T = decided[0]
    return value


def own_device_map() -> dict[str, int] | None:
    """Give this process the GPU of its number on its machine, as a device map; None without CUDA.

    ProcessesError for more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return None
    index = local_rank() if num_processes() > 1 else 0
    count = torch.cuda.device_count()
    if index >= count:
        raise ProcessesError(
            f"process {index} of this machine has no GPU of its own: start as many as there are "
            f"GPUs, {count} (--nproc_per_node {count})"
        )
    torch.cuda.set_device(index)
    return {"": index}


def warn_of_idle_gpus() -> None:
    """Warn that one process uses one GPU on a machine of several, and say how to use them all."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_processes() == 1 and count > 1:
        most = max(n for n in (2, 4, 8, 16) if n <= count)
        warnings.warn(
            f"healing trains on one of {count} GPUs: torchrun --nproc_per_node {most} -m shallower "
            f"heal trains on {most}, each of which holds the whole model",
            stacklevel=2,
        )
