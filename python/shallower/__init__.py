"""Find the layers a large language model can do without, cut them out, measure the cost.

Implements *The Unreasonable Ineffectiveness of the Deeper Layers* (arXiv 2403.17887).
Layers are counted from 0 and ranges are half-open, everywhere. Importing this package
loads no torch; the names that need it load it when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._core import __version__
from .accumulation import analyse_states
from .artifacts import Block, Comparison, Cut, Loss, ModelIdentity, Plan, Rejection, TextsIdentity
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
from .gguf import count_gguf_layers, plan_gguf, prune_gguf
from .healing.recipe import Recipe
from .healing.record import Healing
from .patching.report import Patch
from .positions import Positions
from .selection import deepest_block
from .similarity import BootstrappedStart, Scan

if TYPE_CHECKING:
    from .checkpoint import prune_checkpoint
    from .evaluation import evaluate_loss
    from .figures import save_heat_map
    from .healing.run import heal, merge
    from .models.loading import load_model
    from .patching.run import patch
    from .patching.writing import save_patched
    from .pipeline import compare_cuts, run, scan, verify_checkpoint
    from .pruning import drop_layers, save_model, without_layers

_NEED_TORCH = {
    "load_model": ".models.loading",
    "scan": ".pipeline",
    "run": ".pipeline",
    "compare_cuts": ".pipeline",
    "verify_checkpoint": ".pipeline",
    "drop_layers": ".pruning",
    "without_layers": ".pruning",
    "save_model": ".pruning",
    "prune_checkpoint": ".checkpoint",
    "evaluate_loss": ".evaluation",
    "save_heat_map": ".figures",
    "patch": ".patching.run",
    "save_patched": ".patching.writing",
    "heal": ".healing.run",
    "merge": ".healing.run",
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
