"""The criteria, a file and a row each."""

from ..criterion import Criterion
from .angular import Angular
from .block_influence import BlockInfluence
from .cka import LinearCka
from .cosine import Cosine
from .deepest import Deepest
from .evolution import Evolution
from .exhaustive import Exhaustive
from .greedy import Greedy
from .linear_map import LinearMap
from .magnitude import Magnitude
from .mask_regression import MaskRegression
from .one_shot import OneShot
from .random import Random
from .reachable import Reachable
from .relative_l2 import RelativeL2
from .taylor import Taylor
from .weights import Weights
from .xmerge import XMerge

criteria: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Angular(),
        Cosine(),
        RelativeL2(),
        LinearCka(),
        LinearMap(),
        Reachable(),
        BlockInfluence(),
        Magnitude(),
        XMerge(),
        OneShot(),
        MaskRegression(),
        Taylor(),
        Weights(),
        Greedy(),
        Exhaustive(),
        Evolution(),
        Deepest(),
        Random(),
    )
}
"""Every criterion by its name; one that is put in here takes part like any other."""

BUILT_IN = tuple(criteria.values())
"""Those of this package, whatever becomes of the table."""


def is_built_in(criterion: Criterion) -> bool:
    """Tell whether a criterion is one of this package as it comes, which its version tells.

    Args:
        criterion: any.

    Returns:
        False for one from outside, and for one of the table whose attributes were changed.
    """
    return any(criterion is one for one in BUILT_IN) and not vars(criterion)
