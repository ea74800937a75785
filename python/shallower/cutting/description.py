"""What is known of the model behind a checkpoint, however it was found out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ..models.fingerprint import Shape
from ..values.plan import Plan
from .mixture import Mixture, StoredLayer


class Description(Protocol):
    """The model behind a checkpoint, for what the names of tensors do not say."""

    @property
    def name(self) -> str:
        """Name of its folder."""

    @property
    def shape(self) -> Shape:
        """Its sizes."""

    @property
    def path(self) -> str:
        """Place of the layers in the model, such as ``model.layers``."""

    @property
    def kinds(self) -> Sequence[object]:
        """For each layer, what layers that should be alike have in common."""

    def vectors(self) -> Iterator[tuple[str, str]]:
        """Names of its one-dimensional weights, in the model and stored, in the modules' order."""

    def shortened(self, raw: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        """The JSON of the config for what stays; ModelError if there is none."""

    def mixture(self) -> Mixture:
        """Its routed experts; ModelError if it has none."""

    def stored_experts(self, plan: Plan) -> Mapping[int, StoredLayer]:
        """Of layers with experts, how a stock loader stores them, if it would build the cut."""
