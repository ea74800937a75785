"""Greedy removal, layer by layer: SLEB (2402.09025)."""

from ...progress import Advance
from ..racing import race
from ..search import Search
from ..subject import Subject


class Greedy(Search):
    """From the whole model on, the layer without which the judge's score is least, n times.

    The choice for n layers is that for n - 1 and one more.
    """

    name = "greedy"
    summary = "One layer after the other, each the one whose removal costs the judge least."
    cost = "At most about n L²/2 layers a text, raced; the states of the paths that were tried."

    def search(self, subject: Subject, n: int, advance: Advance) -> list[int]:
        """Search as :meth:`Search.search`."""
        gone: list[int] = []
        for _ in range(n):
            left = subject.trials.path(gone)
            cuts = [(*gone, layer) for layer in left]
            found = race(subject.trials, cuts, alpha=self.alpha, advance=advance)
            gone.append(left[found.winner])
        return gone

    def steps(self, subject: Subject, n: int) -> int:
        """Count steps as :meth:`Search.steps`."""
        return sum(subject.num_layers - k for k in range(n)) * subject.trials.num_looks
