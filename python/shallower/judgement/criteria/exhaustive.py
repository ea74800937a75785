"""Every contiguous block, raced: the ground truth for criteria that score blocks."""

from ...progress import Advance
from ..racing import race
from ..search import Search
from ..subject import Subject


class Exhaustive(Search):
    """The contiguous block of n layers without which the judge's score is least."""

    name = "exhaustive"
    summary = "The judge's score without each contiguous block; the blocks are raced."
    cost = "At most (L-n)(L-n+3)/2 layers a text, about half of it raced; the states of a path."

    def search(self, subject: Subject, n: int, advance: Advance) -> range:
        """Search as :meth:`Search.search`."""
        blocks = [range(start, start + n) for start in range(subject.num_layers - n + 1)]
        found = race(subject.trials, blocks, alpha=self.alpha, advance=advance)
        return blocks[found.winner]

    def steps(self, subject: Subject, n: int) -> int:
        """Count steps as :meth:`Search.steps`."""
        return (subject.num_layers - n + 1) * subject.trials.num_looks
