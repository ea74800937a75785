"""A part of an evaluation: the losses of whole batches of all texts or windows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ScanError
from ..results.loss import Loss
from ..results.perplexity import Perplexity
from ..results.scores import Scores
from ..values.identity import ModelIdentity

SIDES = ("base", "cut")
"""The whole model, and that without layers."""

LEAST = {
    "loss": {"num_rejected": 0, "vocab_size": 2},
    "perplexity": {"bos": 0, "context": 2, "num_rest": 0},
}
"""What a part says of a measure beside its losses, and the least that it can be."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a part has of one measure."""

    num_items: int  # texts, or windows, in all
    settings: Mapping[str, int]  # of a result beside its losses, by the names of ``LEAST``
    items: tuple[int, ...]  # (S,) the indices of the part's texts among all, ascending
    counts: tuple[int, ...]  # (S,) the predicted tokens of each
    num_bytes: tuple[int, ...] | None  # (S,) the bytes of what is predicted, where counted
    nats: Mapping[str, NDArray[np.float64]]  # (S,) the summed losses of each, by side

    def __post_init__(self) -> None:
        of_each = [self.counts, *self.nats.values()]
        of_each += [] if self.num_bytes is None else [self.num_bytes]
        if any(len(one) != len(self.items) for one in of_each):
            raise ValueError(f"it has not a value for each of {len(self.items)} texts")
        if [*self.items] != sorted({*self.items}) or min(self.counts, default=1) < 1:
            raise ValueError("its texts do not ascend, or have no tokens")
        if self.num_items < 1:
            raise ValueError("it is of no texts")
        if not all(np.isfinite(one).all() for one in self.nats.values()):
            raise ValueError("a loss is not finite")


@dataclass(frozen=True, slots=True)
class MeasuredPart:
    """What a unit of an evaluation found."""

    machine: Mapping[str, Any]  # on which the last bits depend
    model: ModelIdentity  # the whole one
    tallies: Mapping[str, Tally]  # by the measure, ``loss`` or ``perplexity``

    def __post_init__(self) -> None:
        for kind, part in self.tallies.items():
            least, found = LEAST[kind], part.settings
            if {*found} != {*least} or any(found[one] < value for one, value in least.items()):
                raise ValueError(f"{kind}: it says {dict(found)}: expected at least {least}")
        if len({(*part.nats,) for part in self.tallies.values()} & {SIDES, SIDES[:1]}) != 1:
            raise ValueError("it has no measure, or not one of the same sides")

    @property
    def measured(self) -> dict[str, Any]:
        """What all parts have alike of each measure."""
        return {
            kind: (part.num_items, part.settings, {*part.nats}, part.num_bytes is None)
            for kind, part in self.tallies.items()
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found of a model, and of a cut of it."""

    values: Mapping[str, Mapping[str, Any]]  # losses or perplexities, by measure and side
    model: ModelIdentity  # the whole one
    machine: Mapping[str, Any] | None  # that which measured; None for several that differ


def evaluation_of(parts: Sequence[MeasuredPart]) -> Evaluation:
    """Put the parts of an evaluation together, to the bits of one process."""
    first, values = parts[0], {}
    if any(one.measured != first.measured for one in parts):
        raise ScanError("the shards are of different measures or cuts: measure them again")
    for kind, part in first.tallies.items():
        of_kind = [one.tallies[kind] for one in parts]
        items = [item for one in of_kind for item in one.items]
        if len(items) != part.num_items or len({*items}) != len(items):
            raise ScanError(
                f"the shards have {len(items):,} losses of {part.num_items:,}, or one twice: "
                f"measure them again"
            )
        counts = _in_order(items, [one.counts for one in of_kind])
        sizes = [one.num_bytes for one in of_kind if one.num_bytes is not None]
        num_bytes = _in_order(items, sizes) if sizes else None
        values[kind] = {
            side: _value(part, Scores(_in_order(items, nats), counts), num_bytes)
            for side in part.nats
            if (nats := [one.nats[side] for one in of_kind])
        }
    is_one = all(one.machine == first.machine for one in parts)
    return Evaluation(values, first.model, first.machine if is_one else None)


def _in_order(items: Sequence[int], found: Sequence[Any]) -> NDArray[np.float64]:
    """(S,) the values of all shards, in the order of their texts."""
    return np.concatenate(found)[np.argsort(items)].astype(np.float64)


def _value(part: Tally, scores: Scores, num_bytes: NDArray[np.float64] | None) -> Loss | Perplexity:
    """The result of one side, of the scores of all texts or windows."""
    of = part.settings
    if "context" in of:
        return Perplexity(of["context"], bool(of["bos"]), of["num_rest"], scores)
    return Loss.of_scores(scores, num_bytes, **of)
