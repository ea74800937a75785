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


def check_plan(
    num_layers: int, n: int, max_blocks: int, protect_first: int, protect_last: int
) -> None:
    """Refuse a plan that cannot be: more layers than are free, or no block at all.

    Raises:
        LayersError: as :func:`check_size`; ``max_blocks`` is less than 1; ``protect_first`` or
            ``protect_last`` is negative; or fewer than ``n`` layers are left between them.
    """
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
