"""Layers drawn at random: what any criterion should beat."""

from collections.abc import Iterable

import numpy as np

from ...progress import Advance
from ..search import Search
from ..subject import Subject


class Random(Search):
    """n of the L layers, every set with the same probability, by the subject's seed."""

    name = "random"
    summary = "Layers drawn at random, by the seed."
    cost = "Nothing."
    strategy = "random"
    judged = False

    def search(self, subject: Subject, n: int, _advance: Advance) -> Iterable[int]:
        """Search as :meth:`Search.search`."""
        drawn = np.random.default_rng((subject.seed, n)).choice(subject.num_layers, n, False)
        return (int(layer) for layer in drawn)
