"""Find the layers a large language model can do without, cut them out, measure the cost.

Implements *The Unreasonable Ineffectiveness of the Deeper Layers* (arXiv 2403.17887).
Layers are counted from 0 and ranges are half-open, everywhere. Importing this package
loads no torch; the names that need it load it when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._core import __version__
from .cutting.gguf import count_gguf_layers, plan_gguf, prune_gguf
from .errors import (
    InMemoryOnlyError,
    LayersError,
    MetricError,
    MissingExtraError,
    ModelError,
    OutputError,
    PatchError,
    PlanError,
    PositionsError,
    RecipeError,
    RejectedSamplesWarning,
    ScanError,
    ShallowerError,
    StatesError,
    TextsError,
    ThreadsError,
    TierError,
)
from .scanning.analyse import analyse_states
from .scanning.scan import BootstrappedStart, Scan
from .values.healing import Healing
from .values.layers import Block, deepest_block
from .values.loss import Comparison, Cut, Loss
from .values.patch import Patch
from .values.plan import ModelIdentity, Plan, Rejection, TextsIdentity
from .values.positions import Positions
from .values.recipe import Recipe

if TYPE_CHECKING:
    from .cutting.checkpoint import prune_checkpoint
    from .cutting.memory import drop_layers, without_layers
    from .cutting.saving import save_model, verify_checkpoint
    from .evaluation.loss import evaluate_loss
    from .healing.heal import heal, merge
    from .healing.patch import patch
    from .healing.saving import save_patched
    from .judgement.compare import compare_cuts
    from .models.loading import load_model
    from .reporting.figures import save_heat_map
    from .runs.run import run
    from .scanning.model import scan

_NEED_TORCH = {
    "load_model": ".models.loading",
    "scan": ".scanning.model",
    "run": ".runs.run",
    "compare_cuts": ".judgement.compare",
    "verify_checkpoint": ".cutting.saving",
    "drop_layers": ".cutting.memory",
    "without_layers": ".cutting.memory",
    "save_model": ".cutting.saving",
    "prune_checkpoint": ".cutting.checkpoint",
    "evaluate_loss": ".evaluation.loss",
    "save_heat_map": ".reporting.figures",
    "patch": ".healing.patch",
    "save_patched": ".healing.saving",
    "heal": ".healing.heal",
    "merge": ".healing.heal",
}

__all__ = [
    "Block",
    "BootstrappedStart",
    "Comparison",
    "Cut",
    "Healing",
    "InMemoryOnlyError",
    "LayersError",
    "Loss",
    "MetricError",
    "MissingExtraError",
    "ModelError",
    "ModelIdentity",
    "OutputError",
    "Patch",
    "PatchError",
    "Plan",
    "PlanError",
    "Positions",
    "PositionsError",
    "Recipe",
    "RecipeError",
    "RejectedSamplesWarning",
    "Rejection",
    "Scan",
    "ScanError",
    "ShallowerError",
    "StatesError",
    "TextsError",
    "TextsIdentity",
    "ThreadsError",
    "TierError",
    "__version__",
    "analyse_states",
    "compare_cuts",
    "count_gguf_layers",
    "deepest_block",
    "drop_layers",
    "evaluate_loss",
    "heal",
    "load_model",
    "merge",
    "patch",
    "plan_gguf",
    "prune_checkpoint",
    "prune_gguf",
    "run",
    "save_heat_map",
    "save_model",
    "save_patched",
    "scan",
    "verify_checkpoint",
    "without_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NEED_TORCH[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
