"""Criteria that judge cuts: one layer at a time, at random, greedily, all of them, by evolution."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...values.costs import Costs
from ..criterion import Criterion, Search
from ..racing import race
from ..subject import Subject
from ..trials import Trials

Cut = frozenset[int]

DROPPED = 0.1
"""The probability with which a mask drops a layer: few go at once, as in a cut that is of use."""

MASKS_PER_LAYER, LEAST_MASKS = 4, 128
"""Masks: more than there are coefficients, and so many that each layer is gone in a dozen."""

ITEMS = 4
"""Items that each mask is judged on, at least: many masks say more than many items."""

RIDGES = np.logspace(-4, 4, 33)
"""Ridges to choose from, times the mean squared singular value of the centred masks."""

OFFSPRING = 16
"""Sets of a generation, and random ones at the start."""

GENERATIONS = 16
"""Generations at most."""

PATIENCE = 4
"""Generations without a better set, after which the search ends."""

MOST_SWITCHES = 3
"""Layers that a mutation exchanges, at most: the lesser of two draws from 1 to so many."""

SURVIVING = 4
"""Of so many sets, one survives a stage of the selection."""


class OneShot(Criterion):
    """The mean score without a layer less that of the whole model, on the same items.

    The error is that of the paired difference.
    """

    name = "one_shot"
    summary = "What the judge's score loses without each single layer."
    cost = "L(L+1)/2 layers a text; the states of one path."

    def costs(self, subject: Subject) -> Costs:
        trials, layers = subject.trials, range(subject.num_layers)
        trials.judge_together([(), *((layer,) for layer in layers)])
        whole = trials.scores(())
        differences = {}
        for layer in reversed(layers):  # the deepest first: what they share is kept longest
            differences[layer] = trials.scores((layer,)).minus(whole)
        return Costs.of_layers(
            [differences[layer].mean for layer in layers],
            stderr=[differences[layer].stderr for layer in layers],
            metric=self.name,
            model=subject.decoder.identity,
        )


class MaskRegression(Criterion):
    """The coefficients of a ridge regression of the judge's score on which layers are gone."""

    name = "mask_regression"
    summary = "The share of each layer in what random cuts cost, by ridge regression."
    cost = "4 L cuts, 128 at least, on the first items, less what they share; states of paths."

    def costs(self, subject: Subject) -> Costs:
        trials = subject.trials
        gone = draw_masks(subject.num_layers, subject.seed)
        cuts = [tuple(int(layer) for layer in np.flatnonzero(mask)) for mask in gone]
        scores = np.empty(len(cuts))
        enough = trials.looks_at(ITEMS)
        trials.judge_together(cuts, enough)
        for index in sorted(range(len(cuts)), key=lambda index: trials.path(cuts[index])):
            scores[index] = trials.scores(cuts[index], looks=enough).mean
        return Costs.of_layers(
            ridge_regression(gone, scores), metric=self.name, model=subject.decoder.identity
        )


class Greedy(Search):
    """From the whole model on, the layer without which the judge's score is least, n times.

    The choice for n layers is that for n - 1 and one more.
    """

    name = "greedy"
    summary = "One layer after the other, each the one whose removal costs the judge least."
    cost = "At most about n L²/2 layers a text, raced; the states of the paths that were tried."

    def search(self, subject: Subject, n: int) -> list[int]:
        gone: list[int] = []
        for _ in range(n):
            left = subject.trials.path(gone)
            cuts = [(*gone, layer) for layer in left]
            gone.append(left[race(subject.trials, cuts, alpha=self.alpha)])
        return gone


class Exhaustive(Search):
    """The contiguous block of n layers without which the judge's score is least."""

    name = "exhaustive"
    summary = "The judge's score without each contiguous block; the blocks are raced."
    cost = "At most (L-n)(L-n+3)/2 layers a text, about half of it raced; the states of a path."

    def search(self, subject: Subject, n: int) -> range:
        blocks = [range(start, start + n) for start in range(subject.num_layers - n + 1)]
        return blocks[race(subject.trials, blocks, alpha=self.alpha)]


class Evolution(Search):
    """An elitist (1 + λ) evolution strategy with selection in stages.

    It starts from the best of all contiguous blocks and as many random sets as a generation has,
    by the first batch of items. A mutation exchanges one to three layers that are gone for as
    many that stay. The offspring are judged on the first batch, the better quarter of them on the
    second too, and so on; the one that is left takes the parent's place if it has the lesser score
    on all items.
    """

    name = "evolution"
    summary = "The best set that mutation and selection by the judge have found."
    cost = "16 generations of 16 sets at most, most of them on 4 items; the states of many paths."

    def search(self, subject: Subject, n: int) -> Iterable[int]:
        random, trials = np.random.default_rng((subject.seed, n)), subject.trials
        layers = range(subject.num_layers)
        first = [frozenset(range(start, start + n)) for start in layers[: len(layers) - n + 1]]
        first += [frozenset(map(int, random.choice(layers, n, False))) for _ in range(OFFSPRING)]
        parent = select(trials, list(dict.fromkeys(first)))
        seen, idle = {*first}, 0
        for _ in range(GENERATIONS):
            offspring = mutations(parent, subject.num_layers, random, seen=seen)
            if not offspring or idle == PATIENCE:
                break
            seen |= set(offspring)
            best = select(trials, offspring)
            score = trials.scores(parent).mean
            idle += 1
            if trials.scores(best).mean < score:
                parent, idle = best, 0
        return parent


def draw_masks(num_layers: int, seed: int) -> NDArray[np.bool_]:
    """Draw which layers are gone in each of ``MASKS_PER_LAYER`` · L cuts, ``LEAST_MASKS`` at least.

    (M, L), each entry true with the probability :data:`DROPPED`. Drawn again until in every mask a
    layer goes and one stays, and every layer goes in one mask and stays in another.
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
    """Regress scores (M,) on masks (M, L): what a layer adds to the score when it is gone, (L,).

    With an intercept and the ridge of the least leave-one-out error, in closed form: with H the
    matrix that makes the fitted scores of the scores, the error of a mask left out is its residual
    divided by ``1 - H_ii`` (Allen 1974).
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


def select(trials: Trials, cuts: list[Cut]) -> Cut:
    """Select one of several cuts in stages: each batch of items leaves one of :data:`SURVIVING`."""
    for look in range(1, trials.num_looks + 1):
        cuts = sorted(cuts, key=trials.path)
        trials.judge_together(cuts, look)
        means = [trials.scores(cut, looks=look).mean for cut in cuts]
        kept = np.argsort(means, kind="stable")[: -(-len(cuts) // SURVIVING)]
        cuts = [cuts[int(number)] for number in kept]
        if len(cuts) == 1:
            break
    trials.judge_together(cuts)
    means = [trials.scores(cut).mean for cut in cuts]
    return cuts[int(np.argmin(means))]


def mutations(
    parent: Cut, num_layers: int, random: np.random.Generator, *, seen: set[Cut]
) -> list[Cut]:
    """Exchange dropped layers for kept ones, into :data:`OFFSPRING` cuts not ``seen``, or fewer."""
    gone, stays = sorted(parent), sorted(set(range(num_layers)) - parent)
    most = min(MOST_SWITCHES, len(gone), len(stays))
    found: dict[Cut, None] = {}
    for _ in range(4 * OFFSPRING):
        switches = int(random.integers(1, most + 1, 2).min())
        out = random.choice(stays, switches, False)
        back = random.choice(gone, switches, False)
        cut = frozenset(map(int, (set(gone) - set(back.tolist())) | set(out.tolist())))
        if cut not in seen:
            found[cut] = None
        if len(found) == OFFSPRING:
            break
    return list(found)
