"""Evolution of a set of layers: EvoPress (2410.14649), by whatever the judge asks for."""

from collections.abc import Iterable

import numpy as np

from ...progress import Advance
from ..search import Search
from ..subject import Subject
from ..trials import Trials

Cut = frozenset[int]

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

    def search(self, subject: Subject, n: int, advance: Advance) -> Iterable[int]:
        """Search as :meth:`Search.search`."""
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
            advance(1, f"{min(score, trials.scores(best).mean):.3f} {trials.judge.unit}")
        return parent

    def steps(self, _subject: Subject, _n: int) -> int:
        """Count steps as :meth:`Search.steps`."""
        return GENERATIONS


def select(trials: Trials, cuts: list[Cut]) -> Cut:
    """Select a cut in stages: each batch of items leaves one of :data:`SURVIVING`.

    Args:
        trials: that judge.
        cuts: different ones.

    Returns:
        The one that is left; what it is on all items, the last stage tells.
    """
    for look in range(1, trials.num_looks + 1):
        cuts = sorted(cuts, key=trials.path)
        means = [trials.scores(cut, looks=look).mean for cut in cuts]
        kept = np.argsort(means, kind="stable")[: -(-len(cuts) // SURVIVING)]
        cuts = [cuts[int(number)] for number in kept]
        if len(cuts) == 1:
            break
    means = [trials.scores(cut).mean for cut in cuts]
    return cuts[int(np.argmin(means))]


def mutations(
    parent: Cut, num_layers: int, random: np.random.Generator, *, seen: set[Cut]
) -> list[Cut]:
    """Exchange layers that are gone for layers that stay.

    Args:
        parent: the layers that are gone.
        num_layers: L.
        random: to draw with.
        seen: cuts that are not to come again.

    Returns:
        Different cuts of as many layers as the parent; :data:`OFFSPRING` of them, or fewer where
        draws keep finding what has been seen.
    """
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
