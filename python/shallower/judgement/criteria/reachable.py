"""How much of a block's output the layer before it cannot be made to write."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import CriterionError
from ...models.layerwise import rows
from ...models.residual_writers import find_writers
from ...progress import track
from ...values.costs import Costs
from ..criterion import Criterion
from ..kept_states import kept_states
from ..subject import Subject
from ..token_states import ALL_TOKENS

PROBES = 5
"""Forwards of one text in which the maps that write into the stream are found, at least."""


class Reachable(Criterion):
    """1 − R² of x⁽ˡ⁾ + ΔW a as a prediction of x⁽ᵐ⁾, on texts held out: what a patch can reach.

    a are the inputs of the last matrix of the feed-forward in layer l − 1, before the block, and
    ΔW is fitted as ΔT is for linear_map. No layer is before layer 0, so blocks that start there
    are not measured; nor those behind a layer that does not write by a plain linear map. A layer
    that only scales costs what those inputs do not tell of the states.
    """

    name = "reachable"
    summary = "1 less the R² of the layer before the block with a new matrix, on texts held out."
    cost = (
        "Two passes over about 8,192 tokens, one of them shared with linear_map; beside what that "
        "keeps 16 bytes a pair of the feed-forward's channels, and its products."
    )

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`.

        Raises:
            CriterionError: no layer's feed-forward writes by a plain linear map.
        """
        kept, size = kept_states(subject), subject.num_layers + 1
        blocks = np.full((size, size), np.nan)
        errors, plain = blocks.copy(), False
        with track(self.name, subject.num_layers - 1, subject.progress) as advance:
            for start, inputs in self._inputs(subject):
                if inputs is not None:
                    plain = True
                    for stop, scores in enumerate(kept.unexplained(start, *inputs), start + 1):
                        blocks[start, stop], errors[start, stop] = scores.mean, scores.stderr
                advance(1)
        if not plain:
            raise CriterionError(
                f"the criterion {self.name} knows only layers whose feed-forward writes into the "
                f"residual stream by a plain linear map, and this model has none (experts, a norm "
                f"behind it, or quantised weights): load it unquantised, or leave out {self.name} "
                f"(--criteria)"
            )
        return Costs.of_blocks(
            blocks, stderr=errors, metric=self.name, model=subject.decoder.identity,
            texts=subject.texts, positions=ALL_TOKENS,
        )  # fmt: skip

    def _inputs(
        self, subject: Subject
    ) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor] | None]]:
        """For every start from 1 on the last matrix's inputs at the tokens that are kept."""
        model, tokens = subject.layerwise, kept_states(subject).tokens
        states = [model.embed(batch) for batch in tokens.batches]
        probe = tokens.batches[0].split(1)[0]
        for layer in range(subject.num_layers - 1):
            for some in model.passes((layer,)):
                beginning = states[0][:1, : probe.input_ids.shape[1]]
                writer = find_writers(model, layer, batch=probe, states=beginning).feed_forward
                parts: tuple[list[torch.Tensor], ...] = ([], [])
                for index, batch in enumerate(tokens.batches):
                    with _watched(None if writer is None else writer.module) as taken:
                        states[index] = model.run(batch, states[index], some)
                    if writer is None:
                        continue
                    inputs = taken[-1].view(*batch.input_ids.shape, -1)
                    for kept, masks in zip(parts, (tokens.fitted, tokens.held_out), strict=True):
                        kept.append(rows(inputs, masks[index]).to(subject.decoder.device))
                subject.meter.ran(1, tokens.num_texts + PROBES)
            yield layer + 1, None if writer is None else (torch.cat(parts[0]), torch.cat(parts[1]))


@contextmanager
def _watched(module: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Keep what a module is given while the body runs."""
    taken: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        taken.append(args[0])

    if module is None:
        yield taken
        return
    handle = module.register_forward_pre_hook(keep)
    try:
        yield taken
    finally:
        handle.remove()
