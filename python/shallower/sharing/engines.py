"""The workers of a command: processes of this machine, or actors of a Ray cluster.

They are counted in GPUs, or on CPUs in the processors that this process may use. All workers of one
work have the same number of threads, because the bits of results depend on it.
"""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from ..errors import ProcessesError
from ..models.dtypes import STREAM, DeviceMap
from ..models.source import ModelSource
from ..processes import processors, requested_threads
from ..values.estimates import MemoryPlan, format_size, needed_device, usable
from ..workers.local_workers import LocalWorkers, Seat
from ..workers.units import Engine, Job

if TYPE_CHECKING:
    from ..values.tokens import Tokens

Memory = Callable[[], MemoryPlan]
"""Forecasts what a replica of the model takes."""


def workers_of(
    job: Job,
    *,
    workers: int | None,
    on: Literal["local", "ray"],
    memory: Memory,
    device_memory: str | None = None,
) -> Engine:
    """Workers for a job; each takes as many GPUs as its model needs, where there are any.

    On a cluster that is one, unless the ``device_memory`` of its GPUs is given. ProcessesError:
    there can be none.
    """
    if on == "local":
        return LocalWorkers(job, seats(job.device_map, workers, memory))
    from ..workers.ray_workers import RayWorkers

    is_told = device_memory is not None and job.device_map != STREAM
    return RayWorkers(job, workers, gpus=_gpus(memory()) if is_told else 1, memory=memory)


def seats(device_map: DeviceMap, workers: int | None, memory: Memory) -> list[Seat]:
    """Divide this machine among workers, by default one for each GPU, or one.

    ProcessesError: their models take more memory than there is.
    """
    cards = cards_for(device_map)
    if not cards and (workers or 1) == 1:
        return [Seat(requested_threads() or processors())]
    plan = memory()
    needed = needed_device(plan.peak_bytes or 0)
    each, most = _shares(cards, plan, needed)
    count = workers or max(1, len(cards) // each)
    if count > max(1, most):
        raise ProcessesError(
            f"{count} workers take {format_size(count * needed)} of memory, {format_size(needed)} "
            f"each, more than there is: expected at most {max(1, most)} (workers, --workers)"
        )
    threads = requested_threads() or max(1, processors() // count)
    if not cards:
        return [Seat(threads)] * count
    first = [worker * each % len(cards) for worker in range(count)]
    return [Seat(threads, ",".join(cards[one : one + each])) for one in first]


def _shares(cards: list[str], plan: MemoryPlan, needed: int) -> tuple[int, int]:
    """The GPUs of each worker, and how many workers there is memory for."""
    if not cards:
        from ..memory.device import available_bytes

        return 0, available_bytes("cpu") // needed
    each = min(_gpus(plan), len(cards))
    on_one = plan.device_bytes // needed if each == 1 else 1
    return each, max(1, on_one) * (len(cards) // each)


def _gpus(plan: MemoryPlan) -> int:
    """The GPUs that a replica needs."""
    return max(1, -(-(plan.peak_bytes or 0) // max(1, usable(plan.device_bytes))))


def cards_for(device_map: DeviceMap) -> list[str]:
    """The GPUs that workers are given, as CUDA names them; none where a model has its own place."""
    if isinstance(device_map, dict) or ":" in str(device_map) or device_map == "cpu":
        return []
    from ..memory.device import num_cards

    count = num_cards()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return [name.strip() for name in named.split(",")][:count]


def memory_of(models: Iterable[ModelSource], tokens: "Tokens") -> MemoryPlan:
    """Forecast what a forward of the largest of some models takes, on a device of its own."""
    from ..forecasts.forecast import forecast_source

    plans = [forecast_source(model, "eval", tokens, processes=2) for model in models]
    return max(plans, key=lambda plan: plan.peak_bytes or 0)
