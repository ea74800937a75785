"""Subject: the model and the texts that criteria look at."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import torch

from ..cutting.in_model import without_layers
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..texts.batches import Batch
from ..values.entries import ResultStore
from ..values.identity import TextsIdentity
from ..values.plan import Plan
from ..values.positions import Positions
from .trials import Trials

Value = TypeVar("Value")

ALL_TOKENS = Positions("all", 0)


@dataclass
class Subject:
    """A model with the texts that a criterion may look at: calibration and selection texts."""

    decoder: Decoder  # the whole model; criteria leave it as it is
    batches: Sequence[Batch]  # calibration texts: for similarity, and to solve maps on
    trials: Trials  # cuts judged on the selection texts
    sizes: Sequence[int]  # how many layers are to go, ascending
    texts: tuple[TextsIdentity, ...] = ()  # of calibration
    seed: int = 0  # of whatever is drawn
    store: ResultStore | None = None  # of the model's results, where scans lie
    # By name, of :meth:`shared`, and layers that it ran.
    made: dict[Hashable, tuple[object, int]] = field(default_factory=dict)
    ran: int = 0  # layers that :meth:`counting` has counted, times texts
    used: set[Hashable] = field(default_factory=set)  # names of what counts among them

    @property
    def num_layers(self) -> int:
        """L, the layers of the model."""
        return len(self.decoder)

    @property
    def num_texts(self) -> int:
        """The calibration texts."""
        return sum(len(batch) for batch in self.batches)

    @cached_property
    def layerwise(self) -> Layerwise:
        """The model as layers that can be run by themselves."""
        return self.trials.model

    def shared(self, name: Hashable, make: Callable[[], Value]) -> Value:
        """Make what several criteria need once; the layers that it runs count for each of them."""
        if name not in self.made:
            before = self.ran
            self.made[name] = make(), self.ran - before
        elif name not in self.used:
            self.ran += self.made[name][1]
        self.used.add(name)
        return cast(Value, self.made[name][0])

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the layers that the body runs, times texts; a backward is two forwards."""

        def count(_part: object, _args: object, output: Any) -> None:
            states = output if isinstance(output, torch.Tensor) else output[0]
            self.ran += len(states) * (3 if states.requires_grad else 1)

        self.ran, self.used = 0, set()
        with ExitStack() as stack:
            for layer in self.decoder.layers.modules:  # one that is stopped does not end
                first = next(layer.children(), layer)
                stack.callback(first.register_forward_hook(count).remove)
            yield


def evenly(batches: Sequence[Batch], num_texts: int) -> list[Batch]:
    """Take at most so many texts, evenly over all, in batches no longer than they are."""
    total = sum(len(batch) for batch in batches)
    wanted = np.linspace(0, total - 1, min(num_texts, total)).round().astype(int)
    found, start = [], 0
    for batch in batches:
        rows = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
        start += len(batch)
        if len(rows):
            mask = batch.attention_mask[rows]
            length = int(mask.sum(axis=1).max())
            found.append(
                Batch(batch.input_ids[rows, :length], mask[:, :length], batch.samples[rows])
            )
    return found


def parameters_share(decoder: Decoder, plan: Plan) -> float:
    """The parameters that go by a plan, as a share of all."""
    whole = num_parameters(decoder.model)
    if plan.experts is None:
        modules = decoder.layers.modules
        return sum(num_parameters(modules[layer]) for layer in plan.dropped) / whole
    with without_layers(decoder.model, plan):
        return 1 - num_parameters(decoder.model) / whole
