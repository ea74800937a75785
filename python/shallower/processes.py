"""How many processes work on one job, and which of them writes."""

import os


def num_processes() -> int:
    """How many processes train together, by the word of torchrun or accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0
