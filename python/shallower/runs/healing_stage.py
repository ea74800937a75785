"""The healing of a run's cut, by what the run has read, loaded and measured already."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cutting.memory import without_layers
from ..errors import PatchError, TextsError
from ..evaluation.loss import measure_loss
from ..healing.checks import require_healable
from ..healing.heal import heal
from ..healing.patched import patched_cut
from ..healing.training import computing
from ..models.decoder import Decoder
from ..models.identity import stored_dtype
from ..values.files import CHECKPOINT_FOLDER, HEALED_FOLDER
from ..values.healing import Healing
from ..values.loss import Loss
from ..values.plan import Plan
from ..values.recipe import Recipe, Resolved
from ..values.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_recipe(model: "PreTrainedModel", heal_steps: int | None) -> Recipe:
    """Choose the settings of a healing for which none are given.

    Args:
        model: the whole model, in the dtype that the cut is saved in.
        heal_steps: steps of the optimiser; the recipe's by default.

    Returns:
        The default recipe in the dtype of the model, float16 as bfloat16.
    """
    dtype: Any = stored_dtype(model)
    recipe = Recipe(dtype="bfloat16" if dtype == "float16" else dtype)
    return recipe if heal_steps is None else replace(recipe, steps=heal_steps)


@dataclass
class HealingStage:
    """The stage of a run that heals its cut.

    :meth:`check` comes before any long work, :meth:`patch` while the whole model is in memory,
    and :meth:`heal` when it is not needed any more.

    Attributes:
        out: the folder of the run.
        recipe: the settings.
        texts: calibration texts, an iterable that can be gone through again.
        eval_texts: held-out texts.
        original: the name of the whole model.
        trust_remote_code: run code that comes with the model.
        overwrite: replace what is healed there already.
        progress: bars with ETA on standard error; by default if that is a terminal.
    """

    out: Path
    recipe: Recipe
    texts: Iterable[str]
    eval_texts: list[str]
    original: str
    trust_remote_code: bool
    overwrite: bool
    progress: bool | None
    _resolved: Resolved = field(init=False)
    _losses: tuple[Loss, Loss | None] = field(init=False)
    _patched: bool = field(init=False)

    def check(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Refuse what the healing would refuse after all the work of the run.

        Args:
            model: the whole model.
            tokenizer: its tokenizer.

        Raises:
            RecipeError, TextsError, MissingExtraError: as :func:`require_healable`.
        """
        self._resolved = require_healable(model, tokenizer, self.texts, recipe=self.recipe)

    def patch(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        plan: Plan,
        *,
        measured: tuple[Loss, Loss],
        tokens: Tokens,
    ) -> None:
        """Do all that needs the whole model, which is as before afterwards.

        Where no patch helps, or the texts are too few for one, a warning says so.

        Args:
            model: the whole model.
            tokenizer: its tokenizer.
            plan: the layers that the cut is without.
            measured: the losses of the whole model and of the cut, as the run measured them.
            tokens: how it did.

        Raises:
            ModelError: a loss is not finite.
            OutputError: the patched cut cannot be written.
        """
        try:
            patched_cut(
                str(self.out / CHECKPOINT_FOLDER), plan, self.original, texts=self.texts,
                out=self.out / HEALED_FOLDER, whole=lambda: (model, tokenizer),
                max_length=self._resolved.max_length, progress=self.progress,
            )  # fmt: skip
            self._patched = True
        except (PatchError, TextsError) as error:
            self._patched = False
            warnings.warn(f"healed from the cut, without a patch: {error}", stacklevel=3)
        self._losses = self._measure(Decoder.of(model), tokenizer, plan, measured, tokens)

    def _measure(
        self,
        decoder: Decoder,
        tokenizer: "PreTrainedTokenizerBase",
        plan: Plan,
        measured: tuple[Loss, Loss],
        tokens: Tokens,
    ) -> tuple[Loss, Loss | None]:
        """The losses of the whole model and of the cut as the healing measures them.

        Those of the run, where it measured in the same way: at the same length, and for the cut
        also with the same products, which are float32 in a recipe of float32 alone. Without a
        patch the loss of the cut is the one that the training must lower, so that in weights of
        another dtype it is left to the healing.
        """
        whole: Loss
        cut: Loss | None
        whole, cut = measured
        resolved = self._resolved
        own = Tokens(resolved.max_length, resolved.batch_size)
        same = own.max_length == tokens.max_length

        def measure(description: str) -> Loss:
            return measure_loss(
                decoder, tokenizer, self.eval_texts, tokens=own, progress=self.progress,
                description=description,
            )  # fmt: skip

        if not same:
            whole = measure("loss, uncut")
        if not self._patched and stored_dtype(decoder.model) != resolved.dtype:
            cut = None
        elif not same or resolved.dtype != "float32":
            with without_layers(decoder.model, plan.blocks), computing(resolved, decoder.device):
                cut = measure("loss, unpatched")
        return whole, cut

    def heal(self) -> Healing:
        """Train the adapters of the cut, patched if a patch helps, and merge them.

        Returns:
            The record of the healing.

        Raises:
            ModelError: the training made it worse, without a patch.
            OutputError: the healed model cannot be written.
        """
        return heal(
            self.out / CHECKPOINT_FOLDER, self.texts, self.out / HEALED_FOLDER,
            recipe=self.recipe, eval_texts=self.eval_texts, original=self.original, merge=True,
            from_patch=self._patched, losses=self._losses, overwrite=self.overwrite,
            progress=self.progress, trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
