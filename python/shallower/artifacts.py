"""The values that pass between the stages: blocks, plans, losses, rejections.

They know no model and no arithmetic; each can be printed, and a plan can be saved.
"""

import hashlib
import json
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar, get_type_hints

from .errors import LayersError, PlanError, PositionsError
from .positions import Positions
from .provenance import versions
from .storage import write_file

PLAN_FILE = "shallower_plan.json"
"""The name of the plan beside the checkpoint that it made."""

SCAN_FILE = "scan.safetensors"
PARTIAL_FILE = "scan.partial.safetensors"
RESULTS_FILE = "results.json"
CHECKPOINT_FOLDER = "checkpoint"


@dataclass(frozen=True, slots=True)
class Block:
    """The layers ``start .. stop-1``, 0-based and half-open.

    ``score`` is the mean distance between the states x^(start) and x^(stop), the pair that
    removing the block joins; ``stderr`` is its standard error. They do not count in
    comparisons: ``Block(11, 19) == scan.best_block(8)`` asks for the range alone.
    """

    start: int
    stop: int
    score: float | None = field(default=None, compare=False)
    stderr: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            object.__setattr__(self, name, layer_number(getattr(self, name)))
        if not 0 <= self.start < self.stop:
            raise LayersError(f"no block [{self.start}, {self.stop}): expected 0 <= start < stop")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"

    def to_json(self) -> dict[str, Any]:
        """The block as plain JSON values."""
        return {**asdict(self), "score": _finite(self.score), "stderr": _finite(self.stderr)}

    @property
    def layers(self) -> range:
        """The indices of the layers in the block."""
        return range(self.start, self.stop)


Layers = Iterable[Block | range | SupportsIndex]
"""What names layers: blocks, ranges and single indices, in any mixture."""


def layer_number(value: Any) -> int:
    """An index or a number of layers as a plain integer.

    Raises:
        LayersError: it is not an integer.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise LayersError(f"{value!r} is no number of layers and no layer index: expected an integer")


def dropped_layers(num_layers: int, layers: Layers) -> tuple[int, ...]:
    """The indices that ``layers`` names, ascending.

    Raises:
        LayersError: an index outside ``0 .. num_layers-1``, one named twice, none at all,
            or every layer of the model.
    """
    if isinstance(layers, Block):
        layers = (layers,)
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise LayersError(f"{layers!r} does not name layers: expected blocks or indices")
    named: list[int] = []
    for item in layers:
        members: Sequence[int]
        if isinstance(item, Block):
            members = item.layers
        else:
            members = item if isinstance(item, range) else (layer_number(item),)
        for index in (members[0], members[-1]) if members else ():
            if not 0 <= index < num_layers:
                raise LayersError(
                    f"the model has no layer {index}: its {num_layers} layers are "
                    f"0 .. {num_layers - 1}"
                )
        named.extend(members)
    for index, count in Counter(named).items():
        if count > 1:
            raise LayersError(f"layer {index} is named twice: name every layer to drop once")
    if not named:
        raise LayersError("no layer is named: name at least one to drop")
    if len(named) == num_layers:
        raise LayersError(f"all {num_layers} layers are named: at least one must stay")
    return tuple(sorted(named))


def blocks_of(layers: Sequence[int]) -> tuple[Block, ...]:
    """The fewest half-open blocks that hold ascending ``layers``."""
    blocks: list[Block] = []
    for layer in layers:
        if blocks and blocks[-1].stop == layer:
            blocks[-1] = Block(blocks[-1].start, layer + 1)
        else:
            blocks.append(Block(layer, layer + 1))
    return tuple(blocks)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a scan and a plan remember of a model, so that a plan is not used on another.

    ``fingerprint`` covers the shape and the one-dimensional weights (norms and biases,
    which no quantiser touches) rounded to bfloat16: the same for every dtype that the
    model is loaded in.
    """

    name: str
    model_type: str
    num_layers: int
    dtype: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name} ({self.num_layers} layers, {self.dtype}, {self.fingerprint[:12]})"


def fingerprint(shape: Sequence[Any], vectors: Iterable[tuple[str, bytes]]) -> str:
    """The hash that :class:`ModelIdentity` keeps.

    Args:
        shape: model type, layers, hidden size, vocabulary size.
        vectors: names and bfloat16 bits of the one-dimensional weights, in the order of the
            model's modules.
    """
    digest = hashlib.sha256(repr(tuple(shape)).encode())
    for name, bits in vectors:
        digest.update(name.encode() + bits)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TextsIdentity:
    """What a scan remembers of its texts: how many, how long at most, and their hash."""

    num_texts: int
    max_length: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Rejection:
    """A sample that was left out, by its index among the texts or states, and why."""

    sample: int
    reason: str

    def __str__(self) -> str:
        return f"sample {self.sample}: {self.reason}"


NAMED_REJECTIONS = 100
"""How many rejected samples are named; the rest are only counted."""


def describe_rejections(num_rejected: int, total: int, rejections: Sequence[Rejection]) -> str:
    """One sentence that counts the rejected samples and names the first of them."""
    named = "; ".join(str(rejection) for rejection in rejections[:5])
    more = f"; and {num_rejected - 5} more" if num_rejected > 5 else ""
    return f"{num_rejected} of {total} samples rejected: {named}{more}"


MAX_LAYERS = 4095
"""More than any model has; keeps a hostile plan from asking for the memory of the machine."""

STRATEGIES = ("similarity", "deepest", "manual")


@dataclass(frozen=True, slots=True)
class Plan:
    """A cut before it is made: which layers go, why, and of which model.

    Attributes:
        num_layers: layers of the model before the cut.
        blocks: disjoint half-open ranges to drop, ascending.
        strategy: ``similarity``, ``deepest`` or ``manual``.
        metric: the metric behind the score, if one decided.
        model: the model it was made for, if known.
        texts: the calibration texts, if any.
        positions: which of their tokens were compared, if that is known.
        versions: the packages that made it.
    """

    num_layers: int
    blocks: tuple[Block, ...]
    strategy: str = "manual"
    metric: str | None = None
    model: ModelIdentity | None = None
    texts: tuple[TextsIdentity, ...] = ()
    positions: Positions | None = None
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        if not 1 <= self.num_layers <= MAX_LAYERS:
            raise LayersError(f"a plan is for 1 to {MAX_LAYERS} layers, not for {self.num_layers}")
        if dropped_layers(self.num_layers, self.blocks) != self.dropped:
            raise LayersError("the blocks of a plan must be ascending")
        if self.strategy not in STRATEGIES:
            raise PlanError(f"unknown strategy {self.strategy!r}: expected one of {STRATEGIES}")
        if self.model and self.model.num_layers != self.num_layers:
            raise PlanError(
                f"the plan is for {self.num_layers} layers, its model has {self.model.num_layers}"
            )

    @property
    def dropped(self) -> tuple[int, ...]:
        """The indices of the layers that go."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    @property
    def survivors(self) -> tuple[int, ...]:
        """The indices of the layers that stay."""
        gone = set(self.dropped)
        return tuple(layer for layer in range(self.num_layers) if layer not in gone)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "format": "shallower.plan",
            "version": 1,
            "num_layers": self.num_layers,
            "drop": [block.to_json() for block in self.blocks],
            "survivors": list(self.survivors),
            "strategy": self.strategy,
            "metric": self.metric,
            "model": asdict(self.model) if self.model else None,
            "texts": [asdict(texts) for texts in self.texts],
            "positions": asdict(self.positions) if self.positions else None,
            "versions": dict(self.versions),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_file(Path(path), (json.dumps(self.to_json(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: the file is not there, is not JSON, or is no plan.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            LayersError,
            PlanError,
            PositionsError,
        ) as error:
            raise PlanError(f"{path} is not a plan of shallower, or is damaged: {error}") from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """A plan from plain JSON values; raises ValueError, KeyError, TypeError or an error of
        ours where they are none.
        """
        kind, version = of_type(dict, data).get("format"), data.get("version")
        if kind != "shallower.plan" or version != 1:
            raise ValueError(
                f"expected format shallower.plan version 1, got {kind!r} version {version!r}"
            )
        plan = cls(
            num_layers=layer_number(data["num_layers"]),
            blocks=tuple(_block(block) for block in of_type(list, data["drop"])),
            strategy=data["strategy"],
            metric=None if data["metric"] is None else of_type(str, data["metric"]),
            model=None if data["model"] is None else from_fields(ModelIdentity, data["model"]),
            texts=tuple(from_fields(TextsIdentity, t) for t in of_type(list, data["texts"])),
            positions=positions_of(data.get("positions")),
            versions={k: of_type(str, v) for k, v in of_type(dict, data["versions"]).items()},
        )
        if list(plan.survivors) != data["survivors"]:
            raise ValueError("its survivors are not the layers that its ranges leave")
        return plan

    def check_model(self, model: ModelIdentity) -> None:
        """Refuse another model than the one that the plan was made for.

        Raises:
            PlanError: the number of layers or the fingerprint differs.
        """
        if self.num_layers != model.num_layers:
            raise PlanError(
                f"the plan is for {self.num_layers} layers, {model.name} has {model.num_layers}"
            )
        if self.model and self.model.fingerprint != model.fingerprint:
            raise PlanError(
                f"the plan was made for {self.model.name} ({self.model.fingerprint[:12]}), and "
                f"{model.name} is another model ({model.fingerprint[:12]}): plan again, or name "
                f"the layers yourself"
            )


T = TypeVar("T")


def of_type(expected: type[T], value: Any) -> T:
    """A value from a file, if it is of the type that it should be; raises TypeError."""
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise TypeError(f"expected {expected.__name__}, got {value!r}")
    return value


def from_fields(kind: type[T], data: Any) -> T:
    """A flat dataclass of plain types from a file; raises TypeError."""
    for name, expected in get_type_hints(kind).items():
        of_type(expected, of_type(dict, data)[name])
    return kind(**data)


def positions_of(data: Any) -> Positions | None:
    """The positions in a file, if there are any; raises TypeError or PositionsError."""
    return None if data is None else from_fields(Positions, data)


def _block(data: Any) -> Block:
    for name in ("score", "stderr"):
        value = of_type(dict, data)[name]
        if value is not None and not math.isfinite(of_type(float, value)):
            raise ValueError(f"its {name} is {value}")
    return Block(**data)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Loss:
    """The mean next-token loss over texts.

    Attributes:
        nats: mean over all predicted tokens, in nats a token.
        stderr: standard error of ``nats``; texts are the independent units, tokens of one
            text are not. NaN for a single text.
        num_tokens: tokens predicted.
        num_texts: texts that count.
        num_rejected: texts with fewer than two tokens.
        vocab_size: size of the vocabulary that the model predicts over.
    """

    nats: float
    stderr: float
    num_tokens: int
    num_texts: int
    num_rejected: int
    vocab_size: int

    @property
    def normalized(self) -> float:
        """The loss divided by ln(vocabulary): 1.0 is a uniform guess."""
        return self.nats / math.log(self.vocab_size)

    @property
    def normalized_stderr(self) -> float:
        """The standard error divided by ln(vocabulary)."""
        return self.stderr / math.log(self.vocab_size)

    def to_json(self) -> dict[str, Any]:
        """The loss as plain JSON values."""
        return {**asdict(self), "stderr": _finite(self.stderr), "normalized": self.normalized}

    def __str__(self) -> str:
        error = f" ± {self.stderr:.3f}" if math.isfinite(self.stderr) else ""
        return f"{self.nats:.3f}{error}"


@dataclass(frozen=True, slots=True)
class Cut:
    """A block and the held-out loss of the model without it."""

    strategy: str
    block: Block
    loss: Loss

    def to_json(self) -> dict[str, Any]:
        """The cut as plain JSON values."""
        return {
            "strategy": self.strategy,
            "drop": self.block.to_json(),
            "loss": self.loss.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The held-out loss of the whole model and of every cut that was tried."""

    base: Loss
    cuts: tuple[Cut, ...]

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return {"base": self.base.to_json(), "cuts": [cut.to_json() for cut in self.cuts]}
