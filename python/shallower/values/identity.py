"""Identities of models, texts and answers."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from .counts import counted

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Keyed(Generic[T]):
    """A value that counts as another one of the same key, so that a cache can take it."""

    key: tuple[Any, ...]  # of hashable parts
    value: T = field(compare=False)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Identity of a model, kept by scans and plans so that a plan is not used on another one.

    ``fingerprint`` covers the shape, the number of experts, and the one-dimensional weights (norms
    and biases, which no quantiser touches) rounded to bfloat16. So it is the same for every dtype
    that the model is loaded in.
    """

    name: str
    model_type: str
    num_layers: int
    dtype: str
    fingerprint: str

    def __str__(self) -> str:
        layers = counted(self.num_layers, "layer")
        return f"{self.name} ({layers}, {self.dtype}, {self.fingerprint[:12]})"


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


def id_in_cache(path: str) -> str | None:
    """The hub id of a model by a path into the hub's cache; None for other paths."""
    found = re.search(r"models--([\w.-]+)/snapshots/", path + "/")
    return found and found[1].replace("--", "/", 1)


def title_of(name: str) -> str:
    """The name of a model for tables and figures: its hub id, or the last part of a path."""
    if cached := id_in_cache(name):
        return cached
    parts = [part for part in name.split("/") if part]
    is_place = len(parts) > 2 or name[:1] in ("/", ".", "~")
    return parts[-1] if parts and is_place else name


@dataclass(frozen=True, slots=True)
class TextsIdentity:
    """Identity of a scan's texts: how many, how long at most, and their hash."""

    num_texts: int
    max_length: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class AnswersIdentity:
    """Identity of the answers of a healing, without those that were left out."""

    num_answers: int
    num_tokens: int  # predicted tokens
    fingerprint: str  # hash of all tokens, those of the prompts too

    def __str__(self) -> str:
        return f"{counted(self.num_answers, 'answer')} of {counted(self.num_tokens, 'token')}"
