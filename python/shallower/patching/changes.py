"""The weights that a patch changes, and what they were before, bit for bit."""

import torch
from torch import nn

from ..models.offload import stored_weight, write_weight
from ..models.residual_writers import Writer


class Changes:
    """Weights that were changed, the first value of each kept in the CPU's memory."""

    def __init__(self) -> None:
        self._undo: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __len__(self) -> int:
        """Weights that are changed."""
        return len(self._undo)

    def set(self, writer: Writer, weight: torch.Tensor) -> None:
        """Change the matrix of a writer.

        Args:
            writer: of the residual stream.
            weight: (D, inputs), of any dtype, on any device.
        """
        self.change(writer.module, "weight", writer.turned(weight))

    def add(self, writer: Writer, delta: torch.Tensor) -> None:
        """Add to the matrix of a writer.

        Args:
            writer: of the residual stream.
            delta: (D, inputs), of any dtype, on any device.
        """
        self.set(writer, delta + writer.weight.to(delta.device))

    def change(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Change a weight where it is stored.

        Args:
            module: the module that has it.
            name: its name there.
            value: the new values, of any dtype, on any device.
        """
        stored = stored_weight(module, name)
        if all(stored is not known for known, _ in self._undo):
            self._undo.append((stored, stored.detach().to("cpu", copy=True)))
        write_weight(module, name, value)

    @torch.no_grad()
    def take_back(self) -> None:
        """Put all weights back, the last first; none is resident any more."""
        while self._undo:
            stored, before = self._undo.pop()
            stored.copy_(before)

    def settle(self) -> None:
        """Forget what the weights were: they stay as they are."""
        self._undo.clear()
