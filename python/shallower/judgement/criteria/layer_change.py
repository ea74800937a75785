"""Criteria of single layers: what a layer changes in the states of all tokens."""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import RejectedSamplesWarning, StatesError
from ...memory.streaming import look_at_states
from ...models.layerwise import token_rows
from ...results.scores import Scores
from ...texts.batches import Batch
from ...values.costs import Costs
from ...values.plan import NAMED_REJECTIONS, Rejection, describe_rejections
from ..criterion import Criterion
from ..subject import ALL_TOKENS, Subject

SHARED_PASS = (
    "One pass over the texts, shared by block_influence, magnitude and xmerge; two states."
)


class BlockInfluence(Criterion):
    """1 − E cos(x, y) over all tokens, x the input and y the output of a layer (2403.03853, §2.3).

    It looks at single layers, so it does not see that two cancel each other, nor what changes
    lengths alone.
    """

    name = "block_influence"
    summary = "1 less the mean cosine of a layer's input and output, over all tokens."
    cost = SHARED_PASS

    def costs(self, subject: Subject) -> Costs:
        cosines, _, tokens = _shared_changes(subject)
        return _clustered(subject, tokens - cosines, tokens, metric=self.name)


class Magnitude(Criterion):
    """E ‖f(x)‖ / ‖x + f(x)‖ over all tokens, f(x) what a layer adds to its input x (2312.09299).

    It looks at single layers, so it does not see that two cancel each other; one that only scales
    the states costs c / (1 + c), though no norm behind it sees that.
    """

    name = "magnitude"
    summary = "Mean length of what a layer adds, over that of its output, over all tokens."
    cost = SHARED_PASS

    def costs(self, subject: Subject) -> Costs:
        _, magnitudes, tokens = _shared_changes(subject)
        return _clustered(subject, magnitudes, tokens, metric=self.name)


class XMerge(Criterion):
    """max(z(Block Influence), z(relative magnitude)), z a standard score over layers (2609.02083).

    A layer is cheap only if both say so. The deviation is that of the L layers, with divisor L;
    where all layers have one value, z is 0.
    """

    name = "xmerge"
    summary = "The larger of the standard scores of block_influence and magnitude over the layers."
    cost = SHARED_PASS

    def costs(self, subject: Subject) -> Costs:
        cosines, magnitudes, tokens = _shared_changes(subject)
        total = tokens.sum()
        influence = 1 - cosines.sum(axis=1) / total
        magnitude = magnitudes.sum(axis=1) / total
        return Costs.of_layers(
            np.maximum(_standard(influence), _standard(magnitude)),
            metric=self.name,
            model=subject.decoder.identity,
            texts=subject.texts,
            positions=ALL_TOKENS,
        )


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = values.std()
    return (values - values.mean()) / (deviation if deviation else 1.0)


def _clustered(
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


Changes = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Over all tokens of a text, first ones too, but no padding: cos(x, y) and ‖y − x‖ / ‖y‖ of every
layer, summed, (L, S) each; and how many tokens, (S,)."""


def _shared_changes(subject: Subject) -> Changes:
    """Sum what every layer does to all tokens, once for all criteria.

    Texts with NaN, infinite or zero states are left out with a warning. A ModelError refuses models
    that pass on more than the residual stream.
    """
    return subject.shared("layer_changes", lambda: _changes(subject))


def _changes(subject: Subject) -> Changes:
    model, batches = subject.layerwise, subject.batches
    model.check(batches[0].split(1)[0])
    before: dict[int, torch.Tensor] = {}
    found: list[list[torch.Tensor]] = [[] for _ in batches]

    def look(place: int, _state: int, states: torch.Tensor) -> None:
        taken = token_rows(batches[place], states)
        if place in before:
            found[place].append(_compared(batches[place], before[place], taken))
        before[place] = taken

    look_at_states(model, batches, look)
    of_batches = [np.stack([sums.cpu().numpy() for sums in one], axis=1) for one in found]
    cosines, magnitudes = np.concatenate(of_batches, axis=2)
    tokens = np.concatenate([batch.attention_mask.sum(axis=1) for batch in batches]) * 1.0
    texts = np.concatenate([batch.samples for batch in batches])
    kept = np.isfinite(cosines + magnitudes).all(axis=0)
    _report(texts[~kept], len(texts))
    return cosines[:, kept], magnitudes[:, kept], tokens[kept]


def _compared(batch: Batch, before: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """What a layer changes in a batch, summed over the tokens of every text: (2, B)."""
    after, before = taken.double(), before.to(taken.device).double()
    cosines = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    magnitudes = (after - before).norm(dim=-1) / after.norm(dim=-1)
    lengths = batch.attention_mask.sum(axis=1).tolist()
    both = torch.stack([cosines, magnitudes]).split(lengths, dim=1)
    return torch.stack([part.sum(-1) for part in both], dim=1)


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
