"""What is read of a model whose layers are streamed, before it is loaded: passes and bytes."""

from collections.abc import Sequence

from ..memory.streaming import Pass, StreamPlan, plan_stream
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource


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
