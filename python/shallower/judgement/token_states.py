"""All tokens of the calibration texts, state by state: what every layer does to them, as sums."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import RejectedSamplesWarning, StatesError
from ..memory.streaming import look_at_states
from ..models.layerwise import token_rows
from ..results.scores import Scores
from ..texts.batches import Batch
from ..values.costs import Costs
from ..values.plan import NAMED_REJECTIONS, Rejection, describe_rejections
from ..values.positions import Positions
from .subject import Subject

ALL_TOKENS = Positions("all", 0)

PROBED = 2
"""Forwards of one text by which a model is checked before it is run layer by layer."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerChanges:
    """What every layer does to the states of all tokens that are no padding, first tokens too."""

    cosines: NDArray[np.float64]  # (L, S) float64, cos(x, y) summed over the tokens of a text
    magnitudes: NDArray[np.float64]  # (L, S) float64, ‖y − x‖ / ‖y‖ likewise
    tokens: NDArray[np.float64]  # (S,) float64, how many those are


def evenly(batches: Sequence[Batch], num_texts: int) -> list[Batch]:
    """Take at most so many texts, evenly over all, in batches no longer than they are."""
    total = sum(len(batch) for batch in batches)
    wanted = np.linspace(0, total - 1, min(num_texts, total)).round().astype(int)
    found, start = [], 0
    for batch in batches:
        rows = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
        start += len(batch)
        if len(rows):
            mask = batch.attention_mask[rows]
            length = int(mask.sum(axis=1).max())
            found.append(
                Batch(batch.input_ids[rows, :length], mask[:, :length], batch.samples[rows])
            )
    return found


def layer_changes(subject: Subject) -> LayerChanges:
    """Sum what every layer does to all tokens, once for all criteria.

    Texts with NaN, infinite or zero states are left out with a warning. A ModelError refuses models
    that pass on more than the residual stream.
    """
    return subject.shared("layer_changes", lambda: _layer_changes(subject))


def layer_costs(
    subject: Subject, values: NDArray[np.float64], tokens: NDArray[np.float64], *, metric: str
) -> Costs:
    """Make costs of layers: means over all tokens, with errors clustered by text.

    ``values`` are sums over the tokens of a text, (L, S), and ``tokens`` their numbers, (S,).
    """
    scores = [Scores(of_layer, tokens) for of_layer in values]
    return Costs.of_layers(
        [score.mean for score in scores],
        stderr=[score.stderr for score in scores],
        metric=metric,
        model=subject.decoder.identity,
        texts=subject.texts,
        positions=ALL_TOKENS,
    )


def _layer_changes(subject: Subject) -> LayerChanges:
    model, batches = subject.layerwise, subject.batches
    model.check(batches[0].split(1)[0])
    changes = [_ChangesByText(batch) for batch in batches]
    look_at_states(model, batches, lambda place, _state, states: changes[place].take(states))
    cosines, magnitudes = np.concatenate([one.sums for one in changes], axis=2)
    tokens = np.concatenate([batch.attention_mask.sum(axis=1) for batch in batches]) * 1.0
    texts = np.concatenate([batch.samples for batch in batches])
    kept = np.isfinite(cosines + magnitudes).all(axis=0)
    _report(texts[~kept], len(texts))
    return LayerChanges(cosines[:, kept], magnitudes[:, kept], tokens[kept])


class _ChangesByText:
    """What every layer changes in a batch, summed over the tokens of every text."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._before: torch.Tensor | None = None
        self._lengths = batch.attention_mask.sum(axis=1).tolist()
        self._found: list[torch.Tensor] = []

    def take(self, states: torch.Tensor) -> None:
        """Compare (B, T, D) states with those that were taken before."""
        taken, before = token_rows(self._batch, states), self._before
        self._before = taken
        if before is None:
            return
        after, before = taken.double(), before.to(taken.device).double()
        cosines = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        magnitudes = (after - before).norm(dim=-1) / after.norm(dim=-1)
        both = torch.stack([cosines, magnitudes]).split(self._lengths, dim=1)
        self._found.append(torch.stack([part.sum(-1) for part in both], dim=1))

    @property
    def sums(self) -> NDArray[np.float64]:
        """(2, L, B): the cosines and the magnitudes."""
        return np.stack([sums.cpu().numpy() for sums in self._found], axis=1)


def _report(rejected: NDArray[np.int64], total: int) -> None:
    """Warn of texts that are left out; refuse if that is all."""
    if not len(rejected):
        return
    reason = "a state holds NaN, infinity or only zeros"
    named = [Rejection(int(text), reason) for text in sorted(rejected)[:NAMED_REJECTIONS]]
    described = describe_rejections(len(rejected), total, named)
    if len(rejected) == total:
        raise StatesError(f"there is nothing to compare: {described}")
    warnings.warn(described, RejectedSamplesWarning, stacklevel=4)
