"""What is read of a model whose layers wait on disk, before it is loaded: passes and bytes."""

from collections.abc import Sequence

from ..judgement.bounds import FIRST_ITEMS, STAGES, exhaustive
from ..judgement.proposals import PROPOSERS
from ..judgement.trials import looks_at
from ..judgement.verifying import SEARCHED, SEEDS
from ..memory.streaming import StreamPlan, plan_stream
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from ..values.layers import blocks_of

TOGETHER = 4
"""States of a text, of those that make room for passes of single ones, where cuts run together."""

Pass = tuple[float, float]
"""How many passes over the layers there are, and the tokens of each."""

CHECKED: Pass = (2, 0)
"""A model runs on one text, whole and layer by layer."""


def plan_passes(source: ModelSource, passes: Sequence[Pass]) -> StreamPlan:
    """Plan what passes over the layers of a model read, at most, about.

    Raises FileNotFoundError where its weights are not known here.
    """
    source = source.resolved()
    files = source.weight_files
    if not files:
        raise FileNotFoundError("the weights are not known here")
    return plan_stream(source.read_config(), files, plain_dtype(source.dtype), passes=passes)


def verified(num_layers: int, n: int, looks: Sequence[int], *, top: int, mean: float) -> list[Pass]:
    """Bound the passes of a race of cuts of ``n`` layers, of texts of ``mean`` tokens.

    Screened by the first looks; exchanged, by two passes a step; patched and raced by stages.
    """
    left, first = num_layers - n, sum(looks[: looks_at(looks, FIRST_ITEMS)])
    step = num_layers * looks[0] * left / 2
    steps = SEEDS + SEARCHED["patch"] * exhaustive(num_layers, n, sum(looks)) / step
    proposed = left + 1 + 2 * len(PROPOSERS)
    each = TOGETHER * mean
    return [
        (looks_at(looks, FIRST_ITEMS), each * proposed * looks[0]),
        (2 * steps, each * num_layers * first),
        (len(STAGES) + 1, each * top * sum(looks)),
        (2, each * top * STAGES[-1]),
    ]


def patched(num_layers: int, dropped: Sequence[int]) -> list[Pass]:
    """Count the passes of a patch in closed form, whose states wait in files.

    Both models run up to the last block, side by side; the losses of the whole model, of the cut,
    and of the cut behind each layer that is solved run from there on.
    """
    blocks, gone = blocks_of(sorted(dropped)), set(dropped)
    first, last = blocks[0].start - 1, blocks[-1].start - 1
    behind = [sum(layer not in gone for layer in range(b.start - 1, num_layers)) for b in blocks]
    losses = num_layers - first + behind[0] + sum(behind)
    moved = blocks[-1].stop + sum(layer not in gone for layer in range(first, last))
    return [CHECKED, ((losses + moved) / num_layers, 0)]
