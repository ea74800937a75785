"""Samples on their way into a scan: hooks, arrays and files all yield the same parts."""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StatesError


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Consecutive samples.

    Attributes:
        states: (B, L+1, D), or (L+1, B, D) if ``state_first``: an array or a tensor on the CPU,
            C-contiguous. The source may overwrite it once the next part is asked for.
        samples: (B,) int64, the numbers by which rejected samples are named.
        steps: how far a bar goes on: texts of a model's batch, else samples.
        state_first: which axis comes first.
        sequences: (B,) int64; neighbours with the same number are of one sequence. By default
            every sample is its own.
    """

    states: Any
    samples: NDArray[np.int64]
    steps: int
    state_first: bool = False
    sequences: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.samples)


def as_array(states: Any) -> NDArray[Any]:
    """View states as the core reads them, without a copy.

    Args:
        states: an array, or a dense tensor on the CPU.

    Returns:
        The array; bfloat16 becomes uint16 bits.

    Raises:
        StatesError: neither an array nor a dense tensor on the CPU.
    """
    if isinstance(states, np.ndarray):
        array = states
    elif "torch" in sys.modules and isinstance(states, sys.modules["torch"].Tensor):
        if states.device.type != "cpu":
            raise StatesError(f"states on {states.device}: bring them to the CPU first")
        tensor = states.detach()
        try:
            if str(tensor.dtype) == "torch.bfloat16":
                tensor = tensor.view(sys.modules["torch"].uint16)
            array = tensor.numpy()
        except (TypeError, RuntimeError) as error:
            raise StatesError(
                f"states of dtype {states.dtype}, layout {states.layout} cannot be read: {error}"
            ) from error
    else:
        raise StatesError(
            f"states must be a path, a NumPy array or a torch tensor, got {type(states)}"
        )
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    if array.dtype.newbyteorder("=") != array.dtype:
        raise StatesError(f"states of dtype {array.dtype}: expected the machine's byte order")
    return array
