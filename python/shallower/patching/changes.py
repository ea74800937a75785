"""The weights that a patch changes, and what they were before, bit for bit."""

import torch
from torch import nn

from ..models.offload import copy_weight, forget_change, write_weight
from ..models.residual_writers import Writer


class Changes:
    """Weights that were changed; the first value of each is kept where no file has it."""

    def __init__(self) -> None:
        self._undo: dict[tuple[nn.Module, str], torch.Tensor | None] = {}

    def __len__(self) -> int:
        return len(self._undo)

    def set(self, writer: Writer, weight: torch.Tensor) -> None:
        """Replace the matrix of a writer by one of (D, inputs), of any dtype, on any device."""
        self.change(writer.module, "weight", writer.turned(weight))

    def add(self, writer: Writer, delta: torch.Tensor) -> None:
        """Add (D, inputs) to the matrix of a writer."""
        self.set(writer, delta + writer.weight.to(delta.device))

    def change(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Write a module's parameter where it is stored, from any dtype and device."""
        if (module, name) not in self._undo:
            self._undo[module, name] = copy_weight(module, name)
        write_weight(module, name, value)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore all weights, the last first."""
        while self._undo:
            (module, name), before = self._undo.popitem()
            if before is None:
                forget_change(module, name)
            else:
                write_weight(module, name, before)

    def commit(self) -> None:
        """Keep the new weights: :meth:`undo` no longer restores the old ones."""
        self._undo.clear()
