"""The bytes that a device has, and those that are free for this process."""

import gc
from typing import Literal, NamedTuple

import torch

from ..errors import ModelError
from ..processes import memory_limits
from ..values.estimates import parse_size


class Room(NamedTuple):
    """Bytes of a device that may be planned with, and whether they are a GPU's."""

    size: int
    card: bool


def available_bytes(device: torch.device | Literal["cpu"]) -> int:
    """Count the bytes that a device has free for this process.

    On a GPU what the driver and torch's own cache have left; on the CPU the memory that is
    available without swapping, and that the limit of a container leaves.
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    import psutil

    left = [free for _, free in memory_limits()]
    return int(min([psutil.virtual_memory().available, *left]))


def num_cards() -> int:
    """Count the GPUs that this process sees; CUDA is not initialised."""
    return torch.cuda.device_count()


def free_memory() -> None:
    """Give the memory of unused models back to the device."""
    gc.collect()  # modules and hooks know one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main_device() -> torch.device:
    """The device that models go to where the user names none: this process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def total_bytes(device: torch.device) -> int:
    """Count all bytes of a device, whether they are free or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def device_room(given: str | int | None = None, processes: int = 1) -> Room:
    """Find the memory that may be planned with: that ``given`` of a card, or what is free here.

    Several processes, each on a GPU of its own, must come to the same choice: they plan with the
    whole memory of the smallest.
    """
    if given is not None:
        size = parse_size(given) if isinstance(given, str) else given
        if size < 1:
            raise ModelError(f"a device of {size} bytes holds nothing: expected at least 1")
        return Room(size, card=True)
    device = main_device()
    if device.type == "cuda" and processes > 1:
        cards = range(torch.cuda.device_count())
        sizes = (torch.cuda.get_device_properties(card).total_memory for card in cards)
        return Room(min(sizes), card=True)
    return Room(available_bytes(device), device.type == "cuda")
