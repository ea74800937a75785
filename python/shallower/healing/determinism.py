"""Training with the same bits every time, and the process left as it was."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..models.dtypes import CUBLAS_WORKSPACE

_FLASH = "FLASH_ATTENTION_DETERMINISTIC"


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let torch use deterministic algorithms alone in the body, on this device.

    Where cuBLAS began without a fixed workspace, as after CUDA work that came before shallower, a
    warning says that bits may differ.
    """
    # transformers' full_determinism does the same and sets CUDA_LAUNCH_BLOCKING besides, after
    # which every kernel is waited for, and nothing is more deterministic for it. It also replaces
    # the workspace of cuBLAS that the user chose.
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    flash = os.environ.get(_FLASH)
    try:
        memory.fill_uninitialized_memory = False  # a twentieth of the time
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        os.environ[_FLASH] = "1"  # read by transformers at every call
        with warnings.catch_warnings():
            if not _products_are_deterministic(device):
                _warn_of_late_setting()
                torch.use_deterministic_algorithms(True, warn_only=True)
                warnings.filterwarnings("ignore", f"(?s).*{CUBLAS_WORKSPACE}", UserWarning)
            yield
    finally:
        memory.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if flash is None:
            os.environ.pop(_FLASH, None)
        else:
            os.environ[_FLASH] = flash


def _products_are_deterministic(device: torch.device) -> bool:
    """Multiply: torch alone knows what cuBLAS read when its first handle was made."""
    square = torch.ones(2, 2, device=device)
    try:
        torch.mm(square, square)
    except RuntimeError as error:
        if CUBLAS_WORKSPACE not in str(error):
            raise
        return False
    return True


def _warn_of_late_setting() -> None:
    warnings.warn(
        f"this training may differ in its last bits when it is repeated: cuBLAS began without a "
        f"fixed workspace, as when CUDA was used in this process before. Set "
        f"{CUBLAS_WORKSPACE}=:4096:8 in the environment before the process starts",
        stacklevel=4,
    )
