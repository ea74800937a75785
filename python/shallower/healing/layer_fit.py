"""One layer of a cut fitted to the uncut model's states by gradient descent: no head, no loss.

All weights of the layer are trained (XMerge, 2609.02083), on states that are made once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError
from ..models.dtypes import computing
from ..models.layerwise import Layerwise
from ..texts.batches import Batch
from ..texts.sequences import Samples, collate, order
from ..values.healing import Step
from ..values.recipe import GLOBAL_BATCH, Resolved


def batch_of(samples: Samples, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
    """Make a batch of sequences.

    Args:
        samples: all sequences.
        indices: those that are wanted.

    Returns:
        The batch, padded on the right.
    """
    parts = dict(collate(samples.rows[index] for index in indices))
    return Batch(parts["input_ids"], parts["attention_mask"], np.asarray(indices, dtype=np.int64))


class SequenceStates:
    """States of sequences, in one temporary file, taken in any order.

    Args:
        file: the file to make.
        samples: the sequences.
        width: D.
        dtype: dtype of the states.
    """

    def __init__(self, file: Path, samples: Samples, width: int, dtype: torch.dtype) -> None:
        self._ends = np.cumsum([len(row) for row in samples.rows])
        size = int(self._ends[-1]) * width
        self._states = torch.from_file(str(file), shared=True, size=size, dtype=dtype)
        self._states = self._states.view(-1, width)

    def put(self, batch: Batch, states: torch.Tensor) -> None:
        """Keep the states of a batch.

        Args:
            batch: its samples are the numbers of the sequences.
            states: (B, T, D), on any device.
        """
        for place, length, row in self._rows(batch):
            self._states[place : place + length].copy_(states[row, :length])

    def take(self, batch: Batch) -> torch.Tensor:
        """Read the states of a batch.

        Args:
            batch: its samples are the numbers of the sequences.

        Returns:
            (B, T, D) on the CPU; zero at padding.
        """
        taken = self._states.new_zeros(*batch.input_ids.shape, self._states.shape[1])
        for place, length, row in self._rows(batch):
            taken[row, :length] = self._states[place : place + length]
        return taken

    def _rows(self, batch: Batch) -> Iterator[tuple[int, int, int]]:
        """The first token of every sequence of a batch, its tokens, and its row."""
        for row, index in enumerate(batch.samples):
            start = int(self._ends[index - 1]) if index else 0
            yield start, int(self._ends[index]) - start, row


def missed_shares(
    batch: Batch, states: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Sum ‖x' − x‖² / ‖x‖² over all tokens but the first of every sequence.

    Args:
        batch: of token ids.
        states: (B, T, D), x'.
        wanted: (B, T, D), x.

    Returns:
        A float32 scalar, and the number of tokens.
    """
    mask = batch.attention_mask.astype(bool)
    mask[:, 0] = False  # it carries massive activations
    places = torch.from_numpy(np.flatnonzero(mask)).to(states.device)
    got = states.flatten(0, 1).index_select(0, places).float()
    expected = wanted.to(states.device).flatten(0, 1).index_select(0, places).float()
    shares = (got - expected).square().sum(-1) / expected.square().sum(-1)
    return shares.sum(), len(places)


def rate_at(step: int, recipe: Resolved) -> float:
    """Give the learning rate of a step: that of any healing, a warm-up and a cosine.

    Args:
        step: counted from 0.
        recipe: the settings.

    Returns:
        The rate.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def fit_layer(
    model: Layerwise,
    layer: int,
    samples: Samples,
    *,
    given: SequenceStates,
    wanted: SequenceStates,
    recipe: Resolved,
    report: Callable[[Step], None],
) -> dict[str, torch.Tensor]:
    """Train all weights of a layer so that it makes given states of others.

    Args:
        model: the cut, whose weights are frozen but for this layer's; they are as trained
            afterwards, in the dtype that they had.
        layer: its index.
        samples: the sequences to train on.
        given: their states before the layer.
        wanted: the states that are to be reached behind it.
        recipe: the settings.
        report: is told of every step: its number from 1, its mean of :func:`missed_shares` and
            its rate.

    Returns:
        The trained weights in float32, by their names in the layer.

    Raises:
        ModelError: the error is not finite.
    """
    module = model.modules[layer]
    weights = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    for weight in weights.values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, weight_decay=0.0)
    taken = order(len(samples), recipe.steps * GLOBAL_BATCH, recipe.seed)
    for step, indices in enumerate(taken.reshape(recipe.steps, GLOBAL_BATCH)):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, recipe)
        error = _accumulate(model, layer, batch_of(samples, indices), given, wanted, recipe)
        if not math.isfinite(error):
            raise ModelError(
                f"the error of the states is {error} at step {step + 1}: lower the learning rate "
                f"(learning_rate, --learning-rate)"
            )
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        report(Step(step + 1, error, rate_at(step, recipe)))
    trained = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.requires_grad_(False)
        weight.data = weight.data.to(dtypes[name])
    return trained


def _accumulate(
    model: Layerwise,
    layer: int,
    batch: Batch,
    given: SequenceStates,
    wanted: SequenceStates,
    recipe: Resolved,
) -> float:
    """The mean error of a step, whose gradient is left in the weights."""
    count = int(batch.attention_mask.sum()) - len(batch)
    total = 0.0
    for part in batch.split(recipe.batch_size):
        device = next(model.modules[layer].parameters()).device
        with computing(recipe, device):
            error = part_error(model, layer, part, given=given, wanted=wanted)
        (error / count).backward()
        total += float(error.detach())
    return total / count


def part_error(
    model: Layerwise, layer: int, batch: Batch, *, given: SequenceStates, wanted: SequenceStates
) -> torch.Tensor:
    """Run a layer on kept states, and sum up what it misses.

    Args:
        model: the cut.
        layer: the index of the layer.
        batch: of sequences whose states are kept.
        given: the states before the layer.
        wanted: the states that are to be reached behind it.

    Returns:
        The sum of :func:`missed_shares`, with its graph.
    """
    states = model.differentiable(batch, given.take(batch), layer)
    return missed_shares(batch, states, wanted.take(batch))[0]
