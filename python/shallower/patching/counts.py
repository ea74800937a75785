"""The layers that a full patch runs: counted before it, for its bar, its time and its disk."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..values.layers import blocks_of

SOLVING, STEPPING = 6, 3.3
"""Layers that run in the time of solving a layer's matrices, and of a step of it, about."""


@dataclass(frozen=True, slots=True)
class PatchLayers:
    """The layers that a full patch runs, by what they run on."""

    num_layers: int  # of the whole model
    num_blocks: int  # blocks that go; the layer before each is solved
    walked: int  # of both models up to the last block, on all batches
    judged: int  # for losses before and after, and behind solved layers, on held-out batches
    rest: int  # of the whole model behind the last block, on the batches to descend on
    moved: int  # in each step: those from the one before the first block on

    @classmethod
    def of(cls, num_layers: int, dropped: Iterable[int]) -> "PatchLayers":
        """Count those of a cut of a model of so many layers."""
        blocks = blocks_of(sorted(dropped))
        stays = sorted({*range(num_layers)}.difference(*(one.layers for one in blocks)))
        first, last, stop = blocks[0].start - 1, blocks[-1].start - 1, blocks[-1].stop
        behind = [sum(layer >= one.start - 1 for layer in stays) for one in blocks]
        walked = stop + sum(first <= layer < last for layer in stays)
        judged = num_layers - first + 3 * behind[0] + sum(behind)
        return cls(num_layers, len(blocks), walked, judged, num_layers - stop, behind[0])

    def times(self, *, fitted: float, held_out: float, descended: float, stepped: float) -> float:
        """Count what takes as long, about, times texts: of a pass, and ``stepped`` in all steps."""
        walked = (self.walked + SOLVING * self.num_blocks) * (fitted + held_out)
        steps = STEPPING * self.moved * stepped
        return walked + self.judged * held_out + self.rest * descended + steps

    def passes(self, steps: int) -> float:
        """Count passes over all layers on disk; those that move are read once, and twice a step."""
        read = self.walked + self.judged + self.rest + (1 + 2 * steps) * self.moved
        return read / self.num_layers
