"""The criteria. A new one is a class in one of these files, and its name in the list below."""

from ..criterion import Criterion
from .baselines import Deepest, Random, Taylor, WeightNorms
from .experts import OF_EXPERTS
from .layer_change import BlockInfluence, Magnitude, XMerge
from .searches import Evolution, Exhaustive, Greedy, MaskRegression, OneShot
from .similarity import (
    Angular,
    BestPlan,
    Cosine,
    LinearCka,
    LinearMap,
    Reachable,
    RelativeL2,
    Scanned,
)

BUILT_IN: tuple[Criterion, ...] = (
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
    WeightNorms(),
    Greedy(),
    Exhaustive(),
    Evolution(),
    Deepest(),
    Random(),
)
"""Those of this package, whatever becomes of the table."""

criteria: dict[str, Criterion] = {criterion.name: criterion for criterion in BUILT_IN}
"""Every criterion by its name; one that is put in here takes part like any other."""


class RecommendedPlan(Criterion):
    """The verified plan of a size: proposals of several criteria, raced by a study's judge."""

    name = "recommended"
    summary = "The best of the proposals of several criteria, raced after a quick patch."
    cost = "A race: proposals, their neighbours and all blocks, on a part of the selection set."


RECOMMENDED = RecommendedPlan.name

NAMED: dict[str, Criterion] = {one.name: one for one in (BestPlan(), RecommendedPlan())}
"""Criteria that take part in a comparison only by their names."""

expert_criteria: dict[str, Criterion] = {criterion.name: criterion for criterion in OF_EXPERTS}
"""Those of experts by their names."""


SCANNED = {one.name for one in (*BUILT_IN, BestPlan()) if isinstance(one, Scanned)} | {RECOMMENDED}
"""Criteria that look at one scan of the last tokens."""


def is_built_in(criterion: Criterion) -> bool:
    """Whether a criterion is one of this package, with its attributes unchanged."""
    stock = (*BUILT_IN, *NAMED.values(), *OF_EXPERTS)
    return any(criterion is one for one in stock) and not vars(criterion)
