"""Find the layers a large language model can do without, cut them out, measure the cost.

Implements *The Unreasonable Ineffectiveness of the Deeper Layers* (arXiv 2403.17887).
Layers are counted from 0 and ranges are half-open, everywhere. Importing this package loads
nothing else: a name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core import __version__ as __version__
    from .cutting.in_model import drop_experts as drop_experts
    from .cutting.in_model import drop_layers as drop_layers
    from .cutting.in_model import without_layers as without_layers
    from .cutting.plans import ForStates as ForStates
    from .cutting.prune import plan_prune as plan_prune
    from .cutting.prune import prune as prune
    from .cutting.saving import save_model as save_model
    from .cutting.saving import verify_checkpoint as verify_checkpoint
    from .errors import CacheError as CacheError
    from .errors import CostsError as CostsError
    from .errors import CriterionError as CriterionError
    from .errors import ExpertsError as ExpertsError
    from .errors import InMemoryOnlyError as InMemoryOnlyError
    from .errors import LayersError as LayersError
    from .errors import MetricError as MetricError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import ModelError as ModelError
    from .errors import OutputError as OutputError
    from .errors import PatchError as PatchError
    from .errors import PlanError as PlanError
    from .errors import PositionsError as PositionsError
    from .errors import ProcessesError as ProcessesError
    from .errors import RecipeError as RecipeError
    from .errors import RejectedSamplesWarning as RejectedSamplesWarning
    from .errors import ScanError as ScanError
    from .errors import SettingsError as SettingsError
    from .errors import ShallowerError as ShallowerError
    from .errors import StatesError as StatesError
    from .errors import TextsError as TextsError
    from .errors import ThreadsError as ThreadsError
    from .errors import TierError as TierError
    from .evaluation.answers import answer_prompts as answer_prompts
    from .evaluation.loss import evaluate_loss as evaluate_loss
    from .evaluation.loss import evaluate_perplexity as evaluate_perplexity
    from .evaluation.speech import evaluate_speech as evaluate_speech
    from .evaluation.tasks import evaluate_tasks as evaluate_tasks
    from .forecasts.forecast import memory_forecast as memory_forecast
    from .forecasts.gain import gain as gain
    from .healing.heal import heal as heal
    from .judgement.criterion import Criterion as Criterion
    from .merging.merge import merge as merge
    from .models.loading import load_model as load_model
    from .models.source import ModelSource as ModelSource
    from .patching.patch import patch as patch
    from .patching.saving import save_patched as save_patched
    from .reporting.charts.heat_map import save_heat_map as save_heat_map
    from .reporting.report import report as report
    from .results.comparison import CriteriaComparison as CriteriaComparison
    from .results.gain import Gain as Gain
    from .results.healing import Healing as Healing
    from .results.loss import Loss as Loss
    from .results.patch import Patch as Patch
    from .results.perplexity import Perplexity as Perplexity
    from .results.speech import Answer as Answer
    from .results.speech import Speech as Speech
    from .results.task_scores import TaskScores as TaskScores
    from .results.verification import Verified as Verified
    from .scanning.analyse import analyse_states as analyse_states
    from .scanning.model import scan as scan
    from .scanning.scan import Scan as Scan
    from .settings.recipe import Recipe as Recipe
    from .settings.stages import PatchSettings as PatchSettings
    from .settings.stages import ScanSettings as ScanSettings
    from .settings.studies import CompareSettings as CompareSettings
    from .settings.studies import CurveSettings as CurveSettings
    from .settings.studies import RunSettings as RunSettings
    from .settings.until import Until as Until
    from .sharing.share import gather as gather
    from .studies.compare import compare as compare
    from .studies.curve import curve as curve
    from .studies.run import run as run
    from .values.costs import BootstrappedStart as BootstrappedStart
    from .values.costs import Costs as Costs
    from .values.estimates import MemoryPlan as MemoryPlan
    from .values.experts import DroppedExperts as DroppedExperts
    from .values.identity import ModelIdentity as ModelIdentity
    from .values.identity import TextsIdentity as TextsIdentity
    from .values.layers import Block as Block
    from .values.layers import deepest_block as deepest_block
    from .values.plan import Plan as Plan
    from .values.plan import Rejection as Rejection
    from .values.positions import Positions as Positions

_NAMES = {
    "_core": "__version__",
    "cutting.in_model": "drop_experts drop_layers without_layers",
    "cutting.plans": "ForStates",
    "cutting.prune": "plan_prune prune",
    "cutting.saving": "save_model verify_checkpoint",
    "errors": (
        "CacheError CostsError CriterionError ExpertsError InMemoryOnlyError LayersError "
        "MetricError MissingExtraError ModelError OutputError PatchError PlanError PositionsError "
        "ProcessesError RecipeError RejectedSamplesWarning ScanError SettingsError ShallowerError "
        "StatesError TextsError ThreadsError TierError"
    ),
    "evaluation.answers": "answer_prompts",
    "evaluation.loss": "evaluate_loss evaluate_perplexity",
    "evaluation.speech": "evaluate_speech",
    "evaluation.tasks": "evaluate_tasks",
    "forecasts.forecast": "memory_forecast",
    "forecasts.gain": "gain",
    "healing.heal": "heal",
    "judgement.criteria": "criteria",
    "judgement.criterion": "Criterion",
    "merging.merge": "merge",
    "models.loading": "load_model",
    "models.source": "ModelSource",
    "patching.patch": "patch",
    "patching.saving": "save_patched",
    "reporting.charts.heat_map": "save_heat_map",
    "reporting.report": "report",
    "scanning.analyse": "analyse_states",
    "scanning.model": "scan",
    "scanning.scan": "Scan",
    "sharing.share": "gather",
    "studies.compare": "compare",
    "studies.curve": "curve",
    "studies.run": "run",
    "results.speech": "Answer Speech",
    "results.comparison": "CriteriaComparison",
    "values.costs": "BootstrappedStart Costs",
    "values.experts": "DroppedExperts",
    "results.gain": "Gain",
    "results.healing": "Healing",
    "values.identity": "ModelIdentity TextsIdentity",
    "values.layers": "Block deepest_block",
    "results.loss": "Loss",
    "values.estimates": "MemoryPlan",
    "results.patch": "Patch",
    "results.perplexity": "Perplexity",
    "values.plan": "Plan Rejection",
    "values.positions": "Positions",
    "settings.recipe": "Recipe",
    "settings.studies": "CompareSettings CurveSettings RunSettings",
    "settings.stages": "PatchSettings ScanSettings",
    "results.task_scores": "TaskScores",
    "settings.until": "Until",
    "results.verification": "Verified",
}
"""The public names of each module that they are imported from; their types are imported above."""

_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .errors import naming_extras

    with naming_extras(f"shallower.{name}"):
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
