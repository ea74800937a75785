"""The bytes of a model's weights by dtype, and the bytes that a device has free."""

import gc
import math
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from ..errors import ModelError
from ..values.memory import parse_size

_CGROUP = Path("/sys/fs/cgroup")

_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a scale in bitsandbytes' 4 bits; scales that share one themselves."""

_NF4_TABLES = 4 * (16 + 256 + 1)
"""The values of the 16 codes, of the scales' 256, and the scales' mean, in float32."""


def weight_bytes(model: PreTrainedModel, dtype: str) -> int:
    """Count the bytes of a model's weights and buffers as they are loaded.

    Args:
        model: in plain weights, or on the meta device; weights that it shares count once.
        dtype: ``float32``, ``bfloat16``, ``float16``, or bitsandbytes' ``nf4`` (with double
            quantisation) or ``int8``, by which embeddings, head and norms stay in bfloat16.

    Returns:
        The bytes.
    """
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return sum(stored_bytes(model, dtype).values()) + buffers


def stored_bytes(model: PreTrainedModel, dtype: str) -> dict[nn.Parameter, int]:
    """Count the bytes of each of a model's weights as it is loaded.

    Args:
        model: as for :func:`weight_bytes`.
        dtype: dtype of the weights.

    Returns:
        The bytes by weight.
    """
    size = 4 if dtype == "float32" else 2
    found = {weight: weight.numel() * size for weight in model.parameters()}
    if dtype in ("nf4", "int8"):
        for module in _quantised(model):
            found[_weight(module)] = _quantised_bytes(module, dtype)
    return found


def num_parameters(module: nn.Module) -> int:
    """Count the values of a module's weights; those that it shares count once.

    Args:
        module: of a model in plain or quantised weights; bitsandbytes puts two of 4 bits in a byte.

    Returns:
        How many there are before they are quantised.
    """
    return sum(
        weight.numel() if state is None else math.prod(state.shape)
        for weight in module.parameters()
        for state in (getattr(weight, "quant_state", None),)
    )


def dequantised_bytes(model: PreTrainedModel, dtype: str) -> int:
    """Count the bytes that quantised weights take while one of them is multiplied by.

    Args:
        model: as for :func:`weight_bytes`.
        dtype: dtype of the weights.

    Returns:
        The bytes of the largest quantised weight in bfloat16; 0 for plain weights.
    """
    if dtype not in ("nf4", "int8"):
        return 0
    return max((2 * _weight(module).numel() for module in _quantised(model)), default=0)


def _quantised(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose weights bitsandbytes quantises, as transformers chooses them."""
    kept = get_keys_to_not_convert(model)
    found: list[nn.Module] = [
        module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and not any(name == one or name.startswith(f"{one}.") for one in kept)
    ]
    return found


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _quantised_bytes(module: nn.Module, dtype: str) -> int:
    weight = _weight(module)
    count = weight.numel()
    if dtype == "int8":
        outputs = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
        return count + 4 * outputs
    scales = -(-count // _BLOCK)
    return -(-count // 2) + scales + 4 * -(-scales // _NESTED_BLOCK) + _NF4_TABLES


def free_bytes(device: torch.device) -> int:
    """Count the bytes that a device has free for this process.

    Args:
        device: a GPU, or the CPU.

    Returns:
        What the driver and torch's own cache have left on a GPU; on the CPU the memory that is
        available without swapping, and that the limit of a container leaves.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    import psutil

    return int(min(psutil.virtual_memory().available, _free_in_container()))


def _free_in_container() -> float:
    """The bytes that the limit of a container leaves; files that are cached can be let go."""
    try:
        limit = float((_CGROUP / "memory.max").read_text())
        used = float((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = sum(float(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError):
        return float("inf")  # no limit, or none that can be read
    return limit - used + cached


def free_memory() -> None:
    """Give the memory of models that nobody holds back to the device."""
    gc.collect()  # modules and hooks know one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main_device() -> torch.device:
    """Find the device that models go to where the user names none.

    Returns:
        The GPU of this process, or the CPU.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_memory(device: torch.device) -> int:
    """Count all bytes of a device, whether they are free or not.

    Args:
        device: a GPU, or the CPU.

    Returns:
        The memory of the GPU, or of the machine.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def device_room(given: str | int | None = None, processes: int = 1) -> tuple[int, bool]:
    """Find the memory that may be planned with.

    Args:
        given: the memory of a card, here or not, as a size in words or in bytes; None for the
            free memory of this machine's own device.
        processes: processes that must all come to the same choice, each on a GPU of its own; they
            plan with the whole memory of the smallest.

    Returns:
        The bytes, and whether they are a GPU's.

    Raises:
        ModelError: the size is none.
    """
    if given is not None:
        size = parse_size(given) if isinstance(given, str) else given
        if size < 1:
            raise ModelError(f"a device of {size} bytes holds nothing: expected at least 1")
        return size, True
    device = main_device()
    if device.type == "cuda" and processes > 1:
        cards = range(torch.cuda.device_count())
        return min(torch.cuda.get_device_properties(card).total_memory for card in cards), True
    return free_bytes(device), device.type == "cuda"
