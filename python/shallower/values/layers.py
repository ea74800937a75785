"""Layers to drop: blocks, sets of layers, the deepest-n heuristic, and layers read from text.

Indices are 0-based and ranges half-open.
"""

import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

from ..errors import LayersError
from .counts import counted
from .schema import finite, of_type


@dataclass(frozen=True, slots=True)
class Block:
    """The layers ``start .. stop-1``, 0-based and half-open.

    ``score`` is the mean distance between the states x^(start) and x^(stop), which removing the
    block joins, or its cost by another criterion; ``stderr`` is its standard error. A block that
    was chosen as the best has as ``criterion`` what its :class:`Plan` says of the choice. They do
    not count in comparisons: ``Block(11, 19) == scan.best_block(8)`` compares the range alone.
    """

    start: int
    stop: int
    score: float | None = field(default=None, compare=False)
    stderr: float | None = field(default=None, compare=False)
    criterion: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

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
        """Its ``start``, ``stop``, ``score`` and ``stderr``; None where they are not finite."""
        score, stderr = finite(self.score), finite(self.stderr)
        return {"start": self.start, "stop": self.stop, "score": score, "stderr": stderr}

    @classmethod
    def from_json(cls, data: Any) -> "Block":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError, ValueError, LayersError."""
        for name in ("score", "stderr"):
            value = of_type(dict, data)[name]
            if value is not None and not math.isfinite(of_type(float, value)):
                raise ValueError(f"its {name} is {value}")
        return cls(**data)

    @property
    def layers(self) -> range:
        """Indices of the layers in the block."""
        return range(self.start, self.stop)


Layers = Iterable[Block | range | SupportsIndex]
"""Names of layers: blocks, ranges and single indices, in any mixture."""


def layer_number(value: Any) -> int:
    """An index or a number of layers as a plain integer; LayersError if it is none."""
    try:
        if type(value).__name__ != "bool":  # NumPy's too, which 2.0 takes for an index
            return operator.index(value)
    except TypeError:
        pass
    _require_whole(value)
    raise LayersError(f"{value!r}: expected an integer layer index or count")


def _require_whole(value: object) -> None:
    """Refuse the name of a half of a layer, as ``3.attention``."""
    half = isinstance(value, str) and re.fullmatch(r"\s*([0-9:]+)\.([a-z][\w-]*)\s*", value)
    if half:
        raise LayersError(
            f"{half[0].strip()} is a half of a layer, and no stock loader would leave it out: "
            f"transformers 5.24 writes per_layer_config skip into a config and ignores it in the "
            f"model, whose logits stay as they are; drop the whole layer ({half[1]})"
        )


def dropped_layers(num_layers: int, layers: Layers) -> tuple[int, ...]:
    """The indices that ``layers`` names, ascending; LayersError for none, all, or unknown ones."""
    if isinstance(layers, Block):
        layers = (layers,)
    _require_whole(layers)
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


MAX_LAYERS = 4095
"""More than any model has; keeps a hostile plan from asking for the memory of the machine."""


def check_size(num_layers: int, n: int) -> None:
    """Refuse a block size that is not in ``1 .. num_layers-1``: LayersError."""
    if num_layers < 2:
        raise LayersError("a model of one layer has no layer that could be dropped")
    if not 1 <= n < num_layers:
        raise LayersError(
            f"cannot drop n = {n} of {num_layers} layers: expected 1 <= n <= {num_layers - 1}"
        )


def check_plan(
    num_layers: int, n: int, max_blocks: int, *, protect_first: int, protect_last: int
) -> None:
    """Refuse a plan of more or fewer layers or blocks than there can be, by a LayersError."""
    check_size(num_layers, n)
    if max_blocks < 1:
        raise LayersError(f"max_blocks = {max_blocks}: expected at least 1")
    for name, value in (("protect_first", protect_first), ("protect_last", protect_last)):
        if value < 0:
            raise LayersError(f"{name} = {value}: expected 0 or more")
    if n > num_layers - protect_first - protect_last:
        raise LayersError(
            f"cannot drop n = {n} of {num_layers} layers with the first {protect_first} and the "
            f"last {protect_last} protected: protect fewer, or drop fewer"
        )


def deepest_block(num_layers: int, n: int) -> Block:
    """Choose the deepest layers but the last, ``[L-1-n, L-1)`` (2403.17887, §4.4).

    Args:
        num_layers: L, layers of the model.
        n: layers to drop.

    Returns:
        The block, without a score.

    Raises:
        LayersError: ``n`` is not in ``1 .. num_layers-1``.
    """
    num_layers, n = layer_number(num_layers), layer_number(n)
    check_size(num_layers, n)
    return Block(num_layers - 1 - n, num_layers - 1)


_PRINTED = r"\[\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*\)"


def parse_layers(text: str) -> list[Block]:
    """Read ``"3,12:20"``, indices and half-open ranges, or ``"[3, 4) [12, 20)"``, as printed."""
    blocks = []
    plain = re.sub(_PRINTED, r"\1:\2", re.sub(r"\)\s*,?\s*\[", "),[", text))
    for part in plain.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?::\s*([0-9]{1,9})\s*)?", part)
        if not match:
            _require_whole(part)
            inclusive = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-|\.\.)\s*([0-9]{1,9})\s*", part)
            guess = ""
            if inclusive:
                first, last = int(inclusive[1]), int(inclusive[2])
                guess = f": did you mean {first}:{last + 1}, which ends with layer {last}?"
            raise LayersError(
                f"cannot read {part!r} in {text!r}: expected indices and half-open ranges "
                f"such as 3,12:20{guess}"
            )
        start = int(match[1])
        blocks.append(Block(start, int(match[2]) if match[2] else start + 1))
    return blocks


def parse_sizes(text: str, *, least: int = 1) -> list[int]:
    """Read ``"1,2,4,8"``: block sizes; LayersError if one is less than ``least``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"0|[1-9][0-9]{0,8}", part) and int(part) >= least for part in parts):
        raise LayersError(
            f"cannot read {text!r}: expected block sizes from {least} on, such as 1,2,4,8 (--n)"
        )
    return sorted({int(part) for part in parts})


def drop_option(blocks: Iterable[Block]) -> str:
    """Blocks as ``--drop`` takes them, the reverse of :func:`parse_layers`: ``3,12:20``."""
    return ",".join(
        str(block.start) if len(block) == 1 else f"{block.start}:{block.stop}" for block in blocks
    )


def layer_count(count: int) -> str:
    """``1 layer``, ``4 layers``."""
    return counted(count, "layer")


def ranges(layers: Sequence[int]) -> str:
    """Ascending layers as half-open ranges: ``[0, 12) [20, 30)``."""
    return " ".join(str(block) for block in blocks_of(layers))


def check_sizes(sizes: Sequence[int], num_layers: int) -> None:
    """Refuse block sizes that the model cannot lose, before any long work: LayersError."""
    if not sizes:
        raise LayersError("no block size is named: name at least one")
    for n in sizes:
        check_size(num_layers, n)
