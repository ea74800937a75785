"""A shard of an evaluation: the losses of whole batches of all texts or windows, a file of JSON.

What shards have in common stands in each, and is compared when they are put together.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ScanError, ShallowerError, why
from ..values.counts import counted
from ..values.hashing import hash_of
from ..values.identity import ModelIdentity
from ..values.loss import Loss, TextLoss
from ..values.perplexity import Perplexity
from ..values.plan import Plan
from ..values.schema import of_type, read
from ..values.scores import Scores
from ..values.shard import Shard, read_shards

FORMAT = "shallower.eval.shard.2"

SIDES = ("base", "cut")
"""The whole model, and that without layers."""

LEAST = {
    "loss": {"num_rejected": 0, "vocab_size": 2},
    "perplexity": {"bos": 0, "context": 2, "num_rest": 0},
}
"""What a shard says of a measure beside its losses, and the least that it can be."""


@dataclass(frozen=True, slots=True)
class Part:
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

    def losses(self, side: str) -> list[TextLoss]:
        """Give the losses of the texts, or windows."""
        return [*zip(self.items, self.nats[side].tolist(), self.counts, strict=True)]

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        measured = "nats" if self.num_bytes is None else "nats and bytes"
        batches = counted(self.num_batches, "batch", "batches")
        return f"{measured} of {batches} of {self.batch_size}, {settings}"


@dataclass(frozen=True, slots=True)
class MeasuredShard:
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

    shard: Shard
    job: str | None
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    described: Mapping[str, Any]
    model: ModelIdentity
    weights: str | None
    plan: Plan | None
    parts: Mapping[str, Part]

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
    def is_complete(self) -> bool:
        """True: it is written when all of its batches are measured."""
        return True

    @property
    def common(self) -> dict[str, object]:
        """What all shards of an evaluation have in common, by the words of an error."""
        parts = self.parts.items()
        return {
            "number of shards": self.shard.count,
            "versions": dict(self.versions),
            "model": str(replace(self.model, name="the model")),
            "weights": str(self.weights)[:12],
            "cut": self._cut,
            "measures": "; ".join(f"{kind}, {part}" for kind, part in parts),
            "texts": "; ".join(f"{part.num_items:,}, {part.fingerprint[:12]}" for _, part in parts),
            "inputs": self.job,
        }

    @property
    def _cut(self) -> str:
        if self.plan is None:
            return "none"
        experts = self.plan.experts
        return self.plan.words if experts is None else f"{self.plan.words}, {experts}"

    def to_bytes(self) -> bytes:
        """Give its file."""
        plain = {
            "format": FORMAT,
            "shard": asdict(self.shard),
            "job": self.job,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "described": dict(self.described),
            "model": asdict(self.model),
            "weights": self.weights,
            "plan": self.plan and self.plan.to_json(),
            "parts": {
                kind: {
                    **{name: getattr(part, name) for name in Part.__dataclass_fields__},
                    "nats": {side: nats.tolist() for side, nats in part.nats.items()},
                }
                for kind, part in self.parts.items()
            },
        }
        return (json.dumps({**plain, "sha256": hash_of(plain)}) + "\n").encode()

    @classmethod
    def load(cls, path: str | Path) -> "MeasuredShard":
        """Read a shard, and check it.

        ScanError: the file is not there, is truncated, damaged or of another version, or is no
        shard of an evaluation.
        """
        try:
            found = of_type(dict, json.loads(Path(path).read_bytes()))
            if (kind := of_type(str, found.pop("format"))) != FORMAT:
                raise ValueError(f"expected format {FORMAT}, got {kind!r}: measure it again")
            if found.pop("sha256") != hash_of({"format": FORMAT, **found}):
                raise ValueError("its checksum does not fit its content")
            shard: MeasuredShard = read(cls, found)
        except OSError as error:
            raise ScanError(f"cannot read the shard {path}: {why(error, path)}") from error
        except (*_DAMAGES, ShallowerError) as error:
            raise ScanError(f"{path} is damaged, or no shard of an eval: {why(error)}") from error
        return shard


_DAMAGES = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found of a model, and of a cut of it.

    Attributes:
        values: by the measure and the side, a :class:`Loss` or :class:`Perplexity`.
        model: the whole model.
        plan: of the layers that ``cut`` is without; None where there is no cut.
        job: as of the shards.
        described: the evaluation, as the first shard says.
        machine: that which measured; None for several that differ.
    """

    values: Mapping[str, Mapping[str, Any]]
    model: ModelIdentity
    plan: Plan | None
    job: str | None
    described: Mapping[str, Any]
    machine: Mapping[str, Any] | None


def gather_evaluation(parts: Iterable[str | Path]) -> Evaluation:
    """Put the shards of an evaluation together, to the bits of one process.

    ScanError: as :func:`shallower.gather`, or texts are missing in a shard.
    """
    shards = read_shards(parts, MeasuredShard.load, "eval")
    first, values = shards[0], {}
    for kind, part in first.parts.items():
        of_kind = [shard.parts[kind] for shard in shards]
        items = [item for one in of_kind for item in one.items]
        if len(items) != part.num_items or len({*items}) != len(items):
            raise ScanError(
                f"the shards have {len(items):,} losses of {part.num_items:,}, or one twice: "
                f"measure them again"
            )
        values[kind] = {side: _VALUES[kind](of_kind, side) for side in part.nats}
    machine = first.machine if all(one.machine == first.machine for one in shards) else None
    return Evaluation(values, first.model, first.plan, first.job, first.described, machine)


def _loss(parts: Sequence[Part], side: str) -> Loss:
    found = [loss for part in parts for loss in part.losses(side)]
    sizes = {
        item: size
        for part in parts
        for item, size in zip(part.items, part.num_bytes or (), strict=part.num_bytes is not None)
    }
    return Loss.of_texts(found, sizes, **parts[0].settings)


def _perplexity(parts: Sequence[Part], side: str) -> Perplexity:
    found = sorted(loss for part in parts for loss in part.losses(side))
    _, nats, counts = (np.array(one, np.float64) for one in zip(*found, strict=True))
    settings = parts[0].settings
    return Perplexity(
        settings["context"], bool(settings["bos"]), settings["num_rest"], Scores(nats, counts)
    )


_VALUES: Mapping[str, Callable[[Sequence[Part], str], Any]] = {
    "loss": _loss,
    "perplexity": _perplexity,
}
