"""Choosing layers: the deepest-n heuristic, and layers named by hand. Sees no torch."""

import re

from .artifacts import Block, layer_number
from .errors import LayersError


def check_size(num_layers: int, n: int) -> None:
    """Refuse a block size that a model cannot lose.

    Raises:
        LayersError: ``n`` is not in ``1 .. num_layers-1``.
    """
    if num_layers < 2:
        raise LayersError("a model of one layer has no layer that could be dropped")
    if not 1 <= n < num_layers:
        raise LayersError(
            f"cannot drop n = {n} of {num_layers} layers: expected 1 <= n <= {num_layers - 1}"
        )


def deepest_block(num_layers: int, n: int) -> Block:
    """The deepest ``n`` layers but the last: ``[L-1-n, L-1)`` (2403.17887, §4.4).

    Raises:
        LayersError: ``n`` is not in ``1 .. num_layers-1``.
    """
    num_layers, n = layer_number(num_layers), layer_number(n)
    check_size(num_layers, n)
    return Block(num_layers - 1 - n, num_layers - 1)


def parse_layers(text: str) -> list[Block]:
    """Read ``"3,12:20"``: indices and half-open ranges.

    Raises:
        LayersError: a part is neither.
    """
    blocks = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?::\s*([0-9]{1,9})\s*)?", part)
        if not match:
            raise LayersError(
                f"cannot read {part!r} in {text!r}: expected indices and half-open ranges "
                f"such as 3,12:20"
            )
        start = int(match[1])
        blocks.append(Block(start, int(match[2]) if match[2] else start + 1))
    return blocks


def parse_sizes(text: str) -> list[int]:
    """Read ``"1,2,4,8"``: block sizes.

    Raises:
        LayersError: a part is not a positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", part) for part in parts):
        raise LayersError(f"cannot read {text!r}: expected block sizes such as 1,2,4,8")
    return sorted({int(part) for part in parts})
