"""Baselines: layers by their place, at random, by gradients, by the size of their weights."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from ...errors import CriterionError, ModelError
from ...healing.losses import TrainingLoss
from ...models.architecture import evaluating
from ...models.decoder import Decoder
from ...models.layerwise import Layerwise
from ...models.residual_writers import find_writers
from ...models.transfers import HostCopies
from ...texts.batches import Batch
from ...values.costs import Costs
from ...values.layers import deepest_block
from ..criterion import Criterion, Search
from ..subject import ALL_TOKENS, Subject, evenly

NUM_TEXTS = 16
"""Texts whose loss is differentiated, at most, evenly over the calibration texts."""

PROBE_TOKENS = 8
"""Made-up tokens, by which the maps that write into the stream are found."""


class Deepest(Search):
    """The simple heuristic of 2403.17887, §4.4: ``[L-1-n, L-1)``."""

    name = "deepest"
    summary = "The deepest layers but the last, whatever the texts are."
    cost = "Nothing."
    strategy = "deepest"
    judged = False

    def search(self, subject: Subject, n: int) -> range:
        return deepest_block(subject.num_layers, n).layers


class Random(Search):
    """n of the L layers, every set with the same probability, by the subject's seed."""

    name = "random"
    summary = "Layers drawn at random, by the seed."
    cost = "Nothing."
    strategy = "random"
    judged = False

    def search(self, subject: Subject, n: int) -> Iterable[int]:
        drawn = np.random.default_rng((subject.seed, n)).choice(subject.num_layers, n, False)
        return (int(layer) for layer in drawn)


class Taylor(Criterion):
    """Σ |W ⊙ ∂L/∂W| over the entries of all matrices W of a layer (2402.02834, eq. 2).

    L is the loss in nats a token over a few texts: gradients are summed over texts first, then
    magnitudes are taken. Vectors, as the weights of norms, do not count. It looks at single
    layers, so it does not see that two cancel each other; and only at the slope of the loss, so
    that it measures what a layer takes part in, and not what its removal would change.
    """

    name = "taylor"
    summary = "Sum of |weight · gradient of the loss| over the matrices of a layer."
    cost = (
        "A forward and a backward of 16 texts, one at a time; beside the activations of one text "
        "4 bytes for every weight of the layers."
    )

    def costs(self, subject: Subject) -> Costs:
        """Differentiate the loss; CriterionError for weights without a gradient."""
        matrices = [
            {weight: None for weight in layer.parameters() if weight.ndim > 1}
            for layer in subject.decoder.layers.modules
        ]
        _check(matrices, self.name)
        sums = _gradients(subject, [weight for layer in matrices for weight in layer])
        costs = [sum(_product(w, sums) for w in layer) if layer else np.nan for layer in matrices]
        for index, cost in enumerate(costs):
            if matrices[index] and not math.isfinite(cost):
                raise ModelError(
                    f"the gradient of layer {index} is not finite: load the model as bfloat16 or "
                    f"float32 (dtype, --dtype)"
                )
        return Costs.of_layers(
            costs,
            metric=self.name,
            model=subject.decoder.identity,
            texts=subject.texts,
            positions=ALL_TOKENS,
        )


class WeightNorms(Criterion):
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
        """Measure norms; a CriterionError says that fewer than two layers have them."""
        norms = np.array(_norms(subject.layerwise))
        measured = np.flatnonzero(np.isfinite(norms))
        if len(measured) < 2:
            raise CriterionError(
                f"the criterion {self.name} needs layers that write by plain linear maps, and "
                f"this model has {len(measured)} (experts, a norm behind the maps, or quantised "
                f"weights): load it unquantised, or leave out {self.name} (--criteria)"
            )
        own, costs = norms[measured], np.full_like(norms, np.nan)
        beside = [np.delete(own[max(0, i - 1) : i + 2], min(i, 1)) for i in range(len(own))]
        means = np.array([around.mean() for around in beside])
        costs[measured] = np.divide(own, means, out=np.full_like(own, np.nan), where=means > 0)
        return Costs.of_layers(costs, metric=self.name, model=subject.decoder.identity)


def _check(matrices: list[dict[nn.Parameter, None]], name: str) -> None:
    for index, layer in enumerate(matrices):
        if any(weight.is_meta or not weight.is_floating_point() for weight in layer):
            raise CriterionError(
                f"the criterion {name} needs gradients, and weights of layer {index} have none "
                f"(quantised, or offloaded): load the model unquantised and whole, or leave out "
                f"{name} (--criteria)"
            )


def _product(weight: nn.Parameter, sums: dict[nn.Parameter, torch.Tensor]) -> float:
    if weight not in sums:  # no text has used it, as that of an expert
        return 0.0
    return float((weight.detach().float() * sums[weight]).abs().sum(dtype=torch.float64))


def _gradients(subject: Subject, weights: list[nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
    """The gradient of the loss to every weight, in float32, summed over the texts."""
    decoder, copies = subject.decoder, HostCopies()
    texts = [text for batch in evenly(subject.batches, NUM_TEXTS) for text in batch.split(1)]
    divisor = sum(int(text.attention_mask.sum()) - 1 for text in texts)
    with _differentiated(decoder, weights) as sums, torch.enable_grad():
        loss_inside = TrainingLoss(decoder.model)
        for text in texts:
            ids, mask = (
                copies.send(torch.from_numpy(array), decoder.device)
                for array in (text.input_ids, text.attention_mask)
            )
            labels = ids.masked_fill(mask == 0, -100)
            with loss_inside.made_inside(labels, divisor):
                outputs = decoder.model(input_ids=ids, attention_mask=mask, use_cache=False)
                TrainingLoss.of(outputs, labels, divisor).backward()
    return sums


@contextmanager
def _differentiated(
    decoder: Decoder, weights: list[nn.Parameter]
) -> Iterator[dict[nn.Parameter, torch.Tensor]]:
    """Let backwards add up the gradients of these weights alone, apart from the model's own."""
    sums: dict[nn.Parameter, torch.Tensor] = {}

    def take(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        if weight in sums:
            sums[weight] += weight.grad
        else:
            sums[weight] = weight.grad.float()
        weight.grad = None

    wanted = set(weights)
    before = [(p, p.requires_grad, p.grad) for p in decoder.model.parameters()]
    with ExitStack() as stack:
        for parameter, requires, gradient in before:
            stack.callback(_put_back, parameter, requires, gradient)
            parameter.grad = None
            parameter.requires_grad_(parameter in wanted)
        for weight in wanted:
            stack.callback(weight.register_post_accumulate_grad_hook(take).remove)
        stack.enter_context(evaluating(decoder.model))
        yield sums


def _put_back(parameter: nn.Parameter, requires: bool, gradient: torch.Tensor | None) -> None:
    parameter.requires_grad_(requires)
    parameter.grad = gradient


def _norms(model: Layerwise) -> list[float]:
    """The norms of what every layer writes by; NaN where that is no plain linear map."""
    batch = Batch(
        np.arange(PROBE_TOKENS)[None] % 3, np.ones((1, PROBE_TOKENS), np.int64), np.zeros(1, int)
    )
    model.check(batch)
    states, norms = model.embed(batch), []
    for layer in model.one_by_one(range(len(model))):
        writers = find_writers(model, layer, batch=batch, states=states)
        squares = [
            (torch.linalg.matrix_norm(w.weight.float()).item() * w.scale) ** 2
            for w in (writers.attention, writers.feed_forward)
            if w is not None
        ]
        norms.append(sum(squares) ** 0.5 if len(squares) == 2 else float("nan"))
        states = model.run(batch, states, (layer,))
    return norms
