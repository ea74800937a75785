"""The criteria, a file and a row each."""

from ..criterion import Criterion
from .angular import Angular
from .block_influence import BlockInfluence
from .cka import LinearCka
from .cosine import Cosine
from .magnitude import Magnitude
from .relative_l2 import RelativeL2
from .taylor import Taylor
from .weights import Weights
from .xmerge import XMerge

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Angular(),
        Cosine(),
        RelativeL2(),
        LinearCka(),
        BlockInfluence(),
        Magnitude(),
        XMerge(),
        Taylor(),
        Weights(),
    )
}
"""Every criterion by its name; one that is put in here takes part like any other."""
