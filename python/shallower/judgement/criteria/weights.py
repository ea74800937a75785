"""The size of a layer's write weights beside its neighbours': no text is looked at."""

import numpy as np
import torch

from ...errors import CriterionError
from ...models.layerwise import Layerwise
from ...models.residual_writers import find_writers
from ...texts.batches import Batch
from ...values.costs import Costs
from ..criterion import Criterion
from ..subject import Subject

PROBE_TOKENS = 8
"""Made-up tokens, by which the maps that write into the stream are found."""


class Weights(Criterion):
    """wₗ over the mean w of its neighbours, w = √(‖W_attention‖² + ‖W_feed-forward‖²).

    Both are the last matrices of their part, in Frobenius norm, times the factor that the layer
    itself puts on what they write. Data-free: it says how much a layer can write, not what, so it
    knows nothing of two layers that cancel each other or of one that only scales. Layers that do
    not write by plain linear maps (experts, quantised weights) are not measured, nor neighbours.
    """

    name = "weights"
    summary = "Norm of the matrices that a layer writes by, over that of its neighbours."
    cost = "No text: a dozen forwards of each layer on 8 made-up tokens; one matrix in float32."

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`.

        Raises:
            CriterionError: fewer than two layers write by plain linear maps.
            ModelError: more than the residual stream goes from layer to layer.
        """
        norms = np.array(_norms(subject.layerwise))
        measured = np.flatnonzero(np.isfinite(norms))
        if len(measured) < 2:
            raise CriterionError(
                f"the criterion {self.name} knows only layers that write into the residual stream "
                f"by plain linear maps, and this model has {len(measured)} (experts, a norm behind "
                f"the maps, or quantised weights): load it unquantised, or leave out {self.name} "
                f"(--criteria)"
            )
        own, costs = norms[measured], np.full_like(norms, np.nan)
        beside = [np.delete(own[max(0, i - 1) : i + 2], min(i, 1)) for i in range(len(own))]
        means = np.array([around.mean() for around in beside])
        costs[measured] = np.divide(own, means, out=np.full_like(own, np.nan), where=means > 0)
        return Costs.of_layers(costs, metric=self.name, model=subject.decoder.identity)


def _norms(model: Layerwise) -> list[float]:
    """The norms of what every layer writes by; NaN where that is no plain linear map."""
    batch = Batch(
        np.arange(PROBE_TOKENS)[None] % 3, np.ones((1, PROBE_TOKENS), np.int64), np.zeros(1, int)
    )
    model.check(batch)
    states, norms = model.embed(batch), []
    for layer in range(len(model)):
        writers = find_writers(model, layer, batch=batch, states=states)
        squares = [
            (torch.linalg.matrix_norm(w.weight.float()).item() * w.scale) ** 2
            for w in (writers.attention, writers.feed_forward)
            if w is not None
        ]
        norms.append(sum(squares) ** 0.5 if len(squares) == 2 else float("nan"))
        states = model.run(batch, states, (layer,))
    return norms
