"""The similarity of layers in a cut: what a scan says when it looks again."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..models.layerwise import Layerwise, rows
from ..scanning.builder import ScanBuilder
from ..texts.batches import Batch
from ..values.costs import Costs
from ..values.scores import Scores
from .token_states import LayerChanges, changes_in, changes_of, states_of

METRICS = ("angular", "relative_l2")


def costs_in_a_cut(
    model: Layerwise, batches: Sequence[Batch], survivors: Sequence[int]
) -> dict[str, Costs]:
    """Measure by several criteria what the layers cost that a cut has left.

    Every batch runs once, through the layers that are left.

    Args:
        model: the whole model, patched or not.
        batches: texts, padded on the right.
        survivors: the layers that are left, ascending.

    Returns:
        By name the costs ``angular`` and ``relative_l2`` of blocks, ``block_influence`` and
        ``magnitude`` of layers. They are of a model of as many layers as are left: its layer i
        is ``survivors[i]``.

    Raises:
        StatesError: no text could be compared. Single texts that cannot are named, with a
            warning.
    """
    builder, sums = ScanBuilder(len(survivors) + 1, METRICS), []
    for batch in batches:
        last: list[torch.Tensor] = []
        run = states_of(model, batch, survivors)
        sums.append(changes_in(batch, _hearing_last_tokens(run, batch, last)))
        builder.add(torch.stack(last), batch.samples, state_first=True)
    scanned, changes = builder.finish(), changes_of(batches, sums)
    found = {name: scanned.costs(name) for name in METRICS}
    return {**found, **_of_layers(changes)}


def _hearing_last_tokens(
    run: Iterator[torch.Tensor], batch: Batch, last: list[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Pass states on, and keep those of the last tokens, (B, D) each, in the CPU's memory."""
    mask = np.zeros(batch.attention_mask.shape, dtype=bool)
    mask[np.arange(len(batch)), batch.attention_mask.sum(axis=1) - 1] = True
    for states in run:
        last.append(rows(states, mask).cpu())
        yield states


def _of_layers(changes: LayerChanges) -> dict[str, Costs]:
    tokens = changes.tokens
    sums = {"block_influence": tokens - changes.cosines, "magnitude": changes.magnitudes}
    return {
        name: Costs.of_layers([Scores(one, tokens).mean for one in of_all], metric=name)
        for name, of_all in sums.items()
    }
