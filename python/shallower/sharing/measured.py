"""A shard of an evaluation: the losses of whole batches of all texts or windows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ScanError
from ..results.loss import Loss
from ..results.perplexity import Perplexity
from ..results.scores import Scores
from ..values.counts import counted
from ..values.identity import ModelIdentity
from ..values.plan import Plan
from ..values.shard import Shard
from .json_shards import JsonShard

SIDES = ("base", "cut")
"""The whole model, and that without layers."""

LEAST = {
    "loss": {"num_rejected": 0, "vocab_size": 2},
    "perplexity": {"bos": 0, "context": 2, "num_rest": 0},
}
"""What a shard says of a measure beside its losses, and the least that it can be."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a shard has of one measure.

    Attributes:
        num_batches: batches of all texts, or windows.
        batch_size: texts in one forward.
        num_items: texts, or windows, in all.
        fingerprint: a hash of all token ids.
        settings: what a result says beside its losses, by the names of ``LEAST``.
        items: (S,) the indices of the shard's texts among all, ascending.
        counts: (S,) the predicted tokens of each.
        num_bytes: (S,) the bytes of what is predicted of each; None where they are not counted.
        nats: (S,) float64, the summed losses of each, by side.
    """

    num_batches: int
    batch_size: int
    num_items: int
    fingerprint: str
    settings: Mapping[str, int]
    items: tuple[int, ...]
    counts: tuple[int, ...]
    num_bytes: tuple[int, ...] | None
    nats: Mapping[str, NDArray[np.float64]]

    def __post_init__(self) -> None:
        of_each = [self.counts, *self.nats.values()]
        of_each += [] if self.num_bytes is None else [self.num_bytes]
        if any(len(one) != len(self.items) for one in of_each):
            raise ValueError(f"it has not a value for each of {len(self.items)} texts")
        if [*self.items] != sorted({*self.items}) or min(self.counts, default=1) < 1:
            raise ValueError("its texts do not ascend, or have no tokens")
        if min(self.num_batches, self.batch_size, self.num_items) < 1:
            raise ValueError("it is of no texts")
        if not all(np.isfinite(one).all() for one in self.nats.values()):
            raise ValueError("a loss is not finite")

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        measured = "nats" if self.num_bytes is None else "nats and bytes"
        batches = counted(self.num_batches, "batch", "batches")
        return f"{measured} of {batches} of {self.batch_size}, {settings}"


@dataclass(frozen=True, slots=True)
class MeasuredShard(JsonShard):
    """A shard of an evaluation.

    Attributes:
        shard: which it is.
        job: a hash of all that the evaluation depends on but the machine; None where that is not
            known.
        versions: of the packages that made it.
        machine: on which the last bits depend.
        described: the evaluation, from which a process makes it again.
        model: the whole model.
        weights: a hash of all that it is made of; None where that is not known.
        plan: of the layers that ``cut`` is without; None where there is no cut.
        parts: what it has of each measure, ``loss`` or ``perplexity``.
    """

    FORMAT = "shallower.eval.shard.2"

    shard: Shard
    job: str | None
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    described: Mapping[str, Any]
    model: ModelIdentity
    weights: str | None
    plan: Plan | None
    parts: Mapping[str, Tally]

    def __post_init__(self) -> None:
        for kind, part in self.parts.items():
            least = LEAST[kind]
            found = part.settings
            if {*found} != {*least} or any(found[one] < value for one, value in least.items()):
                raise ValueError(f"{kind}: it says {dict(found)}: expected at least {least}")
            if (*part.nats,) != SIDES[: 1 if self.plan is None else 2]:
                raise ValueError(f"{kind}: it is of {', '.join(part.nats)}")
        if not self.parts:
            raise ValueError("it has no measure")

    @property
    def common(self) -> dict[str, object]:
        """What all shards of an evaluation have in common, by the words of an error."""
        parts, cut = self.parts.items(), self.plan and [self.plan.words, self.plan.experts]
        return {
            "number of shards": self.shard.count,
            "versions": dict(self.versions),
            "model": str(replace(self.model, name="the model")),
            "weights": str(self.weights)[:12],
            "cut": ", ".join(str(one) for one in cut or ["none"] if one),
            "measures": "; ".join(f"{kind}, {part}" for kind, part in parts),
            "texts": "; ".join(f"{part.num_items:,}, {part.fingerprint[:12]}" for _, part in parts),
            "inputs": self.job,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found of a model, and of a cut of it.

    Attributes:
        values: by the measure and the side, a :class:`Loss` or :class:`Perplexity`.
        of: the first shard, which says of what.
        machine: that which measured; None for several that differ.
    """

    values: Mapping[str, Mapping[str, Any]]
    of: MeasuredShard
    machine: Mapping[str, Any] | None


def evaluation_of(shards: Sequence[MeasuredShard]) -> Evaluation:
    """Put the shards of an evaluation together, to the bits of one process.

    ScanError: texts are missing in a shard.
    """
    first, values = shards[0], {}
    for kind, part in first.parts.items():
        of_kind = [shard.parts[kind] for shard in shards]
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
    is_one = all(one.machine == first.machine for one in shards)
    return Evaluation(values, first, first.machine if is_one else None)


def _in_order(items: Sequence[int], found: Sequence[Any]) -> NDArray[np.float64]:
    """(S,) the values of all shards, in the order of their texts."""
    return np.concatenate(found)[np.argsort(items)].astype(np.float64)


def _value(part: Tally, scores: Scores, num_bytes: NDArray[np.float64] | None) -> Loss | Perplexity:
    """The result of one side, of the scores of all texts or windows."""
    of = part.settings
    if "context" in of:
        return Perplexity(of["context"], bool(of["bos"]), of["num_rest"], scores)
    return Loss.of_scores(scores, num_bytes, **of)
