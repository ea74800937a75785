"""The deepest layers but the last, which need no text."""

from ...progress import Advance
from ...values.layers import deepest_block
from ..search import Search
from ..subject import Subject


class Deepest(Search):
    """The simple heuristic of 2403.17887, §4.4: ``[L-1-n, L-1)``."""

    name = "deepest"
    summary = "The deepest layers but the last, whatever the texts are."
    cost = "Nothing."
    strategy = "deepest"
    judged = False

    def search(self, subject: Subject, n: int, _advance: Advance) -> range:
        """Search as :meth:`Search.search`."""
        return deepest_block(subject.num_layers, n).layers
