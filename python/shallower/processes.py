"""The processes that work on one job, and the one of them that writes."""

import os


def num_processes() -> int:
    """Count the processes that train together, as torchrun or accelerate started them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Say whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0
