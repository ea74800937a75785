"""Random-mask regression: Bonsai (2402.05406), for layers."""

import numpy as np
from numpy.typing import NDArray

from ...progress import track
from ...values.costs import Costs
from ..criterion import Criterion
from ..subject import Subject

DROPPED = 0.1
"""The probability with which a mask drops a layer: few go at once, as in a cut that is of use."""

MASKS_PER_LAYER, LEAST_MASKS = 4, 128
"""Masks: more than there are coefficients, and so many that each layer is gone in a dozen."""

ITEMS = 4
"""Items that each mask is judged on, at least: many masks say more than many items."""

RIDGES = np.logspace(-4, 4, 33)
"""Ridges to choose from, times the mean squared singular value of the centred masks."""


class MaskRegression(Criterion):
    """The coefficients of a ridge regression of the judge's score on which layers are gone."""

    name = "mask_regression"
    summary = "The share of each layer in what random cuts cost, by ridge regression."
    cost = "4 L cuts, 128 at least, on the first items, less what they share; states of paths."

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`."""
        trials = subject.trials
        gone = draw_masks(subject.num_layers, subject.seed)
        cuts = [tuple(int(layer) for layer in np.flatnonzero(mask)) for mask in gone]
        scores = np.empty(len(cuts))
        enough = np.searchsorted(np.cumsum([len(part) for part in trials.judge.items]), ITEMS)
        with track(self.name, len(cuts), subject.progress) as advance:
            for index in sorted(range(len(cuts)), key=lambda index: trials.path(cuts[index])):
                scores[index] = trials.scores(cuts[index], looks=int(enough) + 1).mean
                advance(1)
        return Costs.of_layers(
            ridge_regression(gone, scores), metric=self.name, model=subject.decoder.identity
        )


def draw_masks(num_layers: int, seed: int) -> NDArray[np.bool_]:
    """Draw which layers are gone in each of ``MASKS_PER_LAYER`` · L cuts, ``LEAST_MASKS`` at least.

    Args:
        num_layers: L.
        seed: of the draws.

    Returns:
        (M, L), each entry true with the probability :data:`DROPPED`. Drawn again until in every
        mask a layer goes and one stays, and every layer goes in one mask and stays in another.
    """
    random, count = np.random.default_rng(seed), max(LEAST_MASKS, MASKS_PER_LAYER * num_layers)
    masks: NDArray[np.bool_] = np.zeros((0, num_layers), dtype=np.bool_)
    while len(masks) < count or not np.all(_mixed(masks, axis=0)):
        drawn = np.less(random.random((count, num_layers)), DROPPED)
        masks = np.concatenate([masks, drawn[_mixed(drawn, axis=1)]])[-count:]
    return masks


def _mixed(masks: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    return np.logical_xor(masks.any(axis=axis), masks.all(axis=axis))


def ridge_regression(masks: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Regress scores on masks, with an intercept and the ridge of the least leave-one-out error.

    The error is in closed form: with H the matrix that makes the fitted scores of the scores, that
    of a mask left out is its residual divided by ``1 - H_ii`` (Allen 1974).

    Args:
        masks: (M, L), true where a layer is gone.
        scores: (M,).

    Returns:
        (L,), what a layer adds to the score when it is gone.
    """
    means, mean = masks.mean(axis=0), scores.mean()
    left, singular, right = np.linalg.svd(masks - means, full_matrices=False)
    turned = left.T @ (scores - mean)
    unit = float(np.mean(singular**2))
    best, chosen = np.inf, np.zeros(masks.shape[1])
    for ridge in RIDGES * unit:
        shrunk = singular**2 / (singular**2 + ridge)
        residuals = scores - mean - left @ (shrunk * turned)
        leverage = 1 / len(masks) + (left**2) @ shrunk
        error = float(np.mean((residuals / (1 - leverage)) ** 2))
        if error < best:
            best, chosen = error, right.T @ (singular / (singular**2 + ridge) * turned)
    return chosen
