"""Subject: the model and the texts that criteria look at."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

from ..cutting.in_model import without_layers
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..texts.batches import Batch
from ..values.identity import TextsIdentity
from ..values.plan import Plan
from .trials import Trials

Value = TypeVar("Value")


@dataclass
class Subject:
    """A model with the texts that a criterion may look at; none of them reports.

    Attributes:
        decoder: the whole model. A criterion leaves it as it is.
        batches: the calibration texts: what similarity is measured on, and maps are solved on.
        trials: cuts judged on the selection texts.
        sizes: how many layers are to go, ascending.
        texts: identity of the calibration texts.
        seed: of whatever is drawn.
        made: what several criteria need, by name, as :meth:`shared` has made it.
    """

    decoder: Decoder
    batches: Sequence[Batch]
    trials: Trials
    sizes: Sequence[int]
    texts: tuple[TextsIdentity, ...] = ()
    seed: int = 0
    made: dict[Hashable, object] = field(default_factory=dict)

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
        """Make what several criteria need once; the same object each time."""
        if name not in self.made:
            self.made[name] = make()
        return cast(Value, self.made[name])


def parameters_share(decoder: Decoder, plan: Plan) -> float:
    """The parameters that go by a plan, as a share of all."""
    whole = num_parameters(decoder.model)
    if plan.experts is None:
        modules = decoder.layers.modules
        return sum(num_parameters(modules[layer]) for layer in plan.dropped) / whole
    with without_layers(decoder.model, plan):
        return 1 - num_parameters(decoder.model) / whole
