"""The criteria. A new one is a class in one of these files, and its name in the list below."""

from ..criterion import Criterion
from .baselines import Deepest, Random, Taylor, WeightNorms
from .experts import OF_EXPERTS
from .layer_change import BlockInfluence, Magnitude, XMerge
from .searches import Evolution, Exhaustive, Greedy, MaskRegression, OneShot
from .similarity import Angular, Cosine, LinearCka, LinearMap, Reachable, RelativeL2

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


expert_criteria: dict[str, Criterion] = {criterion.name: criterion for criterion in OF_EXPERTS}
"""Those of experts by their names."""


def is_built_in(criterion: Criterion) -> bool:
    """Whether a criterion is one of this package, with its attributes unchanged."""
    stock = (*BUILT_IN, *OF_EXPERTS)
    return any(criterion is one for one in stock) and not vars(criterion)
