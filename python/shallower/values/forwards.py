"""Forwards: layers and heads run on texts, as work is counted before it is done."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Forwards:
    """What is run, each but the passes times the texts that it is run on.

    Attributes:
        layers: decoder layers.
        heads: final norms and heads, with what is made of their logits.
        passes: over all layers, where each is read from disk for all that runs together.
    """

    layers: float = 0
    heads: float = 0
    passes: float = 0

    def __mul__(self, times: float) -> "Forwards":
        return Forwards(self.layers * times, self.heads * times, self.passes)
