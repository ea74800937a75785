"""CurveTerms: what a curve is asked for, with the texts that it is measured on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..texts.sequences import ReadOnce
from ..texts.splits import Splits
from ..values.curve import State
from ..values.recipe import Recipe
from ..values.tokens import Tokens
from .curve_tasks import CurveTasks


@dataclass(frozen=True, kw_only=True)
class CurveTerms:
    """What a curve is asked for.

    Attributes:
        sizes: layers that go, ascending, without 0.
        strategies: that choose them.
        states: how far each cut is made good.
        splits: texts that fit, choose and report.
        out: the folder of the curve.
        quick_patch: whether the patch is one matrix a block, and not the full one.
        patch_tokens: tokens that a full patch is fitted on, at most.
        tasks: that are done beside the loss.
        heal: settings of the training, once they are chosen.
        to_heal: texts to train on, which neither choose nor report.
        origin: the name of the model, and whether code that comes with it may run.
        top: proposals of every criterion, of the strategy ``recommended``.
        tokens: length of texts, and how many make one forward.
        threads: threads of the Rust core, all by default.
        seed: of whatever is drawn.
        identities: what tells the texts that fit and choose, and those that report, from others.
        job: what tells this curve from others; None where that is not known.
        progress: bars with ETA on standard error.
    """

    sizes: Sequence[int]
    strategies: Sequence[str]
    states: Sequence[State]
    splits: Splits
    out: Path
    quick_patch: bool
    patch_tokens: int
    tasks: CurveTasks
    heal: Recipe | None
    to_heal: ReadOnce
    origin: tuple[str, bool]
    top: int
    tokens: Tokens
    threads: int | None
    seed: int
    identities: tuple[str, str]
    job: str | None
    progress: bool | None

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as it is told beside the figures."""
        patch = None
        if set(self.states) != {"cut"}:
            patch = "quick" if self.quick_patch else "full"
        return {
            "n": list(self.sizes),
            "strategies": list(self.strategies),
            "states": list(self.states),
            "patch": patch,
            "patch_tokens": self.patch_tokens if patch == "full" else None,
            "heal": self.heal and asdict(self.heal),
            "tasks": self.tasks.to_json(),
            "top": self.top,
            "seed": self.seed,
        }
