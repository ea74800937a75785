"""The machine at hand as a device of the roofline, by a benchmark of a second."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from ..memory.sizes import device_memory, main_device
from .devices import DEVICES, HERE, Device, known_as

_WIDTH = 2048
"""Rows and columns of the matrices that are multiplied."""

_ROWS = 512
"""Tokens that are multiplied at once, to find the peak."""

_STREAMED = 1 << 28
"""Bytes of matrices that are read in turn on a CPU, to find the bandwidth: no cache holds them."""

_STREAMED_GPU = 1 << 31

_REPEATS = 7

_CPUINFO = Path("/proc/cpuinfo")


def this_machine(dtype: str, clock: Callable[[], float] = time.perf_counter) -> Device:
    """Measure this machine: its GPU if it has one, else its CPU.

    Bandwidth is that of products of a vector with matrices that no cache holds, the peak that of
    products of matrices, and a launch the time of an operation on one number inside a module: the
    medians of a few repeats.

    Args:
        dtype: of the weights; those in 4 or 8 bits are multiplied in bfloat16.
        clock: seconds; that of the process leaves out what others take of a busy CPU.

    Returns:
        The device, of which the peak of this dtype alone is known.
    """
    name = "bfloat16" if dtype in ("nf4", "int8") else dtype
    device, plain = main_device(), getattr(torch, name)
    streamed = _STREAMED_GPU if device.type == "cuda" else _STREAMED
    size = _WIDTH * _WIDTH * plain.itemsize
    count = -(-streamed // size)
    with torch.inference_mode():
        # Written once, as a page of zeros that nobody wrote lies in no memory.
        matrices = torch.full((count, _WIDTH, _WIDTH), 0.5, dtype=plain, device=device)
        row = torch.ones((1, _WIDTH), dtype=plain, device=device)
        rows = row.expand(_ROWS, _WIDTH).contiguous()

        def stream() -> None:
            for matrix in matrices:
                nn.functional.linear(row, matrix)

        def multiply() -> None:
            for matrix in matrices[:4]:
                nn.functional.linear(rows, matrix)

        few, one = _FewOperations(), torch.zeros(1, dtype=plain, device=device)
        streaming = _seconds(stream, device, clock)
        multiplying = _seconds(multiply, device, clock)
        launching = _seconds(lambda: few(one), device, clock)
    peaks = {name: 8 * _ROWS * _WIDTH**2 / multiplying}
    return Device(
        HERE, title_of(device), peaks, count * size / streaming, device_memory(device),
        "measured here", launching / _FewOperations.COUNT,
    )  # fmt: skip


def own_device() -> Device:
    """Find the GPU of this machine in the table of devices.

    Returns:
        Its entry; that of an A100 of 80 GB where there is no GPU, or one that is not in the table.
    """
    device = main_device()
    found = known_as(title_of(device)) if device.type == "cuda" else None
    return found or DEVICES["a100-80"]


class _FewOperations(nn.Module):
    """Operations on one number, a few to a module, as models have them."""

    COUNT = 200

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_Norm() for _ in range(self.COUNT // 4))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            value = part(value)
        return value


class _Norm(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return (value * value).mean(-1, keepdim=True).add(1.0)


def _seconds(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """The median time of some work, once it is warm."""
    work()
    times = []
    for _ in range(_REPEATS):
        settle(device)
        started = clock()
        work()
        settle(device)
        times.append(clock() - started)
    return median(times)


def settle(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def title_of(device: torch.device) -> str:
    """Name a device of this machine for people.

    Args:
        device: a GPU, or the CPU.

    Returns:
        The name of the GPU, or of the processor with the threads that torch takes.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s'[: threads > 1]}"
