"""Lossless cuts: the layers that no hidden state of a list needs."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import LayersError
from ..values.layers import Block, layer_number
from ..values.plan import Plan


@dataclass(frozen=True, slots=True)
class ForStates:
    """The layers that some hidden states do not need, as what is dropped.

    State ``i`` is ``hidden_states[i]`` of transformers, the input of layer ``i``; state 0 is the
    embeddings. The last state of a stock model is behind the final norm, so state K needs the
    layers ``[0, K + 1)``. Several image models read such states of their text encoder.

    Attributes:
        states: integers in any order; kept ascending, each once.

    Raises:
        LayersError: no state is named, or one is not an integer.

    Example:
        >>> plan = sh.prune("HuggingFaceTB/SmolLM2-135M", sh.ForStates([9, 18]), "encoder")
        >>> plan.survivors == tuple(range(19))
        True
    """

    states: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.states, str) or not isinstance(self.states, Iterable):
            raise LayersError(f"{self.states!r} names no states: expected integers, as [9, 18, 27]")
        states = tuple(sorted({layer_number(state) for state in self.states}))
        if not states:
            raise LayersError("no state is named: name at least one that is read")
        object.__setattr__(self, "states", states)

    @classmethod
    def parse(cls, text: str) -> "ForStates":
        """Read ``"9,18,27"``; LayersError if a part is not an integer."""
        parts = text.split(",")
        if not all(re.fullmatch(r"\s*-?[0-9]{1,9}\s*", part) for part in parts):
            raise LayersError(f"cannot read the states {text!r}: expected integers such as 9,18,27")
        return cls(tuple(map(int, parts)))

    def plan(self, num_layers: int) -> Plan:
        """Plan the cut of a model; LayersError if it has not these states, or none can go."""
        first, last = self.states[0], self.states[-1]
        if first < 0:
            raise LayersError(
                f"state {first} counts from the end, where layers go: expected states from 0 on "
                f"(of {num_layers} layers -1 is {num_layers}, which is behind the final norm)"
            )
        if last > num_layers:
            raise LayersError(
                f"the model has no state {last}: its {num_layers} layers have the states "
                f"0 .. {num_layers}"
            )
        if last >= num_layers - 1:
            raise LayersError(
                f"state {last} of {num_layers} layers needs all of them, since the last state of a "
                f"stock model is behind the final norm: no layer can go"
            )
        blocks = (Block(last + 1, num_layers),)
        return Plan(num_layers, blocks, "states", states=self.states)

    def to_json(self) -> dict[str, list[int]]:
        """The states as plain JSON values."""
        return {"for_states": list(self.states)}
