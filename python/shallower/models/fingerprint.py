"""What distinguishes a model from others, whatever dtype it is loaded in."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple


class Shape(NamedTuple):
    """The sizes of a model; ``num_experts`` are the routed ones of a layer, 0 if it has none."""

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_experts: int = 0


def fingerprint(shape: Shape, vectors: Iterable[tuple[str, bytes]]) -> str:
    """Hash what distinguishes models, for :class:`.ModelIdentity`, in hexadecimal digits.

    ``vectors`` are names and bfloat16 bits of the one-dimensional weights, in the order of modules.
    A model without experts is hashed as before experts were counted.
    """
    counted_sizes = tuple(shape) if shape.num_experts else tuple(shape)[:-1]
    digest = hashlib.sha256(repr(counted_sizes).encode())
    for name, bits in vectors:
        digest.update(name.encode() + bits)
    return digest.hexdigest()
