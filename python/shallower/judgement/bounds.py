"""What a verification takes at most: it is known before anything is run."""

from collections.abc import Sequence

from ..values.forwards import Forwards
from .proposals import PROPOSERS
from .trials import looks_at

FIRST_ITEMS = 4
"""Items on which the search for neighbours judges, at least."""

STAGES = (FIRST_ITEMS, 16)
"""Items after which a race of patched cuts is thinned out."""

SEARCHED = {"none": 1 / 10, "patch": 1 / 16}
"""Share of the layers of an exhaustive search, beyond which no step of the search begins."""

SEEDS = 3
"""Cuts that the search begins from, the best first."""

MOST = 0.24
"""Share of them that a race takes at most, where two cuts do not take more; what it takes is
estimated, and a quarter is the bound."""


def exhaustive(num_layers: int, n: int, num_texts: int) -> int:
    """Count the layers, times texts, of every contiguous block of a size, none of them shared."""
    left = num_layers - n
    return (left + 1) * left * num_texts


def verifying_forwards(
    num_layers: int,
    n: int,
    looks: Sequence[int],
    *,
    top: int,
    proposing: float,
    patch_texts: int,
    texts_of_item: float = 1,
    after: str = "patch",
) -> Forwards:
    """Bound what a verification takes, times texts, about: what is sure, and what it may add.

    Its passes are those of the screening, two a step of the search, and those of the race.

    ``looks`` are the items of each selection batch, and ``texts_of_item`` the texts
    that run for each; ``proposing`` are the layers that criteria run, and ``patch_texts`` the texts
    of a quick patch.
    """
    left, items, first = num_layers - n, sum(looks), sum(looks[: looks_at(looks, FIRST_ITEMS)])
    proposed = left + 1 + 2 * len(PROPOSERS)  # every block, and two sets of each criterion
    screened = proposed * looks[0] + 2 * top * (first - looks[0])
    as_cut = sum(looks[: looks_at(looks, STAGES[-1])])
    heads = 1.0 * screened + 2 * (items - first + as_cut)  # two cuts go on to the end
    layers = proposing
    if after == "patch":
        heads += (top + 1) * first
        layers += num_layers * patch_texts + (top + 1) * n * patch_texts
    heads *= texts_of_item
    # Half of the layers of a cut were run for another one, or lie before its patch.
    layers += heads * left / 2
    whole = exhaustive(num_layers, n, items)
    more = max(0.0, MOST * texts_of_item * whole - layers)
    steps = SEEDS + SEARCHED[after] * whole / (num_layers * looks[0] * left / 2)
    passes = looks_at(looks, FIRST_ITEMS) + 2 * steps + len(STAGES) + 3
    return Forwards(layers + more, heads + 2 * more / max(1, left), passes)
