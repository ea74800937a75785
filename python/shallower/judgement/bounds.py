"""What a verification takes at most: it is known before anything is run."""

from collections.abc import Sequence

from ..values.forwards import Forwards
from .proposals import PROPOSERS
from .trials import looks_at

FIRST_ITEMS = 4
"""Items on which the search for neighbours judges, at least."""

STAGES = (FIRST_ITEMS, 16)
"""Items after which a race of patched cuts is thinned out."""

MOST = 0.24
"""Share of them that a race takes at most, where two cuts do not take more; what it takes is
estimated, and a quarter is the bound."""


def exhaustive(num_layers: int, n: int, num_items: int) -> int:
    """Count the layers, times items, of every contiguous block of a size, none of them shared."""
    left = num_layers - n
    return (left + 1) * left * num_items


def verifying_forwards(
    num_layers: int,
    n: int,
    looks: Sequence[int],
    *,
    top: int,
    proposing: float,
    patch_texts: int,
    after: str = "patch",
) -> Forwards:
    """Bound what a verification takes, times texts: what is sure, and what a race may add to it.

    ``looks`` are the items of each batch of those that choose; ``proposing`` the layers that
    criteria run, and ``patch_texts`` the texts of a quick patch.
    """
    left, items, first = num_layers - n, sum(looks), sum(looks[: looks_at(looks, FIRST_ITEMS)])
    proposed = left + 1 + 2 * top * len(PROPOSERS)
    screened, again = proposed * looks[0], 2 * top * (first - looks[0])
    as_cut = sum(looks[: looks_at(looks, STAGES[-1])])
    last = 2 * (items - first + as_cut)  # two cuts go on to the end
    # Of what is screened, sorted by paths, half of the layers were run for another cut.
    layers = proposing + screened * left / 2 + (again + last) * left
    heads = screened + again + last
    if after == "patch":
        patched = top + 1
        layers += num_layers * patch_texts + patched * (n * patch_texts + first * left)
        heads += patched * first
    more = max(0.0, MOST * exhaustive(num_layers, n, items) - layers)
    return Forwards(layers + more, heads + 2 * more / max(1, left))
