"""What is read of a model whose layers are streamed, before it is loaded: passes and bytes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil

from ..memory.rehearsal import build_empty
from ..memory.streaming import Pass, StreamPlan, plan_stream
from ..models.architecture import find_layers
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from ..patching.descent import kept_bytes
from ..storage import free_bytes, temporary
from ..values.counts import counted
from ..values.memory import format_size


def plan_passes(
    source: ModelSource, passes: Sequence[Pass], *, num_compared: float = 0
) -> StreamPlan:
    """Plan what passes over the layers of a model read, at most, about.

    Of ``num_compared`` tokens of a pass all states are kept. Raises FileNotFoundError where its
    weights are not known here.
    """
    source = source.resolved()
    files, dtype = source.weight_files, plain_dtype(source.dtype)
    if not files:
        raise FileNotFoundError("the weights are not known here")
    return plan_stream(source.read_config(), files, dtype, passes=passes, num_compared=num_compared)


@dataclass(frozen=True, slots=True)
class StepsPlan:
    """What the steps of a patch take of the disk, whose layers wait there.

    Attributes:
        steps: how many there are, at most.
        passes: those over all layers that they take, of all that are planned.
        bytes: of temporary files: old and new values of the matrices, moves and momenta.
        free_bytes: what is free where temporary files go.
    """

    steps: int
    passes: int
    bytes: int
    free_bytes: int

    def to_json(self) -> dict[str, int]:
        """Give the fields as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lacks = "" if self.bytes <= self.free_bytes else ", which is not enough: name another"
        passes, size = counted(self.passes, "pass", "passes"), format_size(self.bytes)
        return (
            f"{counted(self.steps, 'step')} take {passes} of these, and {size} of temporary files, "
            f"of {format_size(self.free_bytes)} that are free in {temporary()} "
            f"(TMPDIR){lacks}"
        )


def plan_steps(source: ModelSource, dropped: Sequence[int], steps: int) -> StepsPlan:
    """Plan the steps of a patch: all layers left from the one before the first block are moved."""
    source = source.resolved()
    layers = find_layers(build_empty(source.read_config(), plain_dtype(source.dtype))).modules
    moving = {*range(min(dropped) - 1, len(layers))} - {*dropped}
    left = [layers[layer] for layer in sorted(moving)]
    passes = ceil(2 * steps * len(left) / len(layers))
    return StepsPlan(steps, passes, kept_bytes(left), free_bytes(temporary("file")))
