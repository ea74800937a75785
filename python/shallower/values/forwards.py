"""Forwards: layers and heads run on texts, as work is counted before it is done."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Forwards:
    """What is run, each times the texts that it is run on.

    Attributes:
        layers: decoder layers.
        heads: final norms and heads, with what is made of their logits.
    """

    layers: float = 0
    heads: float = 0

    def __add__(self, other: "Forwards") -> "Forwards":
        return Forwards(self.layers + other.layers, self.heads + other.heads)

    def __mul__(self, times: float) -> "Forwards":
        return Forwards(self.layers * times, self.heads * times)
