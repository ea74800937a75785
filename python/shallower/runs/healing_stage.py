"""The healing of a run's checkpoint, and what it is worth on the texts that report."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..evaluation.loss import fitting_tokens
from ..healing.checks import require_healable
from ..healing.heal import heal
from ..judgement.held_out_cuts import loss_as_it_is
from ..judgement.judges.judge import judged_batches
from ..judgement.judges.loss import LossJudge
from ..models.decoder import Decoder
from ..models.identity import stored_digest, stored_dtype
from ..models.layerwise import Layerwise
from ..models.source import ModelSource
from ..reporting.results import Run
from ..values.files import CHECKPOINT_FOLDER, HEALED_FOLDER
from ..values.healing import Healing
from ..values.loss import Loss
from ..values.recipe import Recipe
from ..values.tokens import Tokens
from .continuing import continue_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_recipe(model: "PreTrainedModel", heal_steps: int | None, seed: int) -> Recipe:
    """Choose the settings of a healing for which none are given.

    Args:
        model: the whole model, in the dtype that the cut is saved in.
        heal_steps: steps of the optimiser; the recipe's by default.
        seed: of the order of sequences, the adapters and dropout.

    Returns:
        The default recipe in the dtype of the model, float16 as bfloat16.
    """
    dtype: Any = stored_dtype(model)
    recipe = Recipe(dtype="bfloat16" if dtype == "float16" else dtype, seed=seed)
    return recipe if heal_steps is None else replace(recipe, steps=heal_steps)


@dataclass
class HealingStage:
    """The stage of a run that trains adapters on its checkpoint, and merges them.

    :meth:`check` comes before any long work, :meth:`heal` when the whole model is not needed in
    memory any more.

    Attributes:
        recipe: the settings.
        texts: texts to train on, which neither choose nor report.
        choosing: texts that the best step is chosen by.
        report: texts that the figure is measured on.
        tokens: how the run measured its losses on them.
        original: the name or place of the whole model.
        trust_remote_code: run code that comes with it.
        overwrite: replace an earlier healed model.
        goes_on: whether an earlier healed model is of this very run.
        progress: bars with ETA on standard error.
    """

    recipe: Recipe
    texts: Iterable[str]
    choosing: list[str]
    report: list[str]
    tokens: Tokens
    original: str
    trust_remote_code: bool
    overwrite: bool
    goes_on: bool
    progress: bool | None

    def check(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Refuse what the healing would refuse after all the work of the run.

        Args:
            model: the whole model.
            tokenizer: its tokenizer.

        Raises:
            RecipeError, TextsError, MissingExtraError: as :func:`require_healable`.
        """
        require_healable(model, tokenizer, self.texts, recipe=self.recipe)

    def heal(self, results: Run) -> Run:
        """Train on the checkpoint, and measure the healed model, reloaded.

        Where the training makes it no better, a warning says so, and the checkpoint stays what is
        recommended.

        Args:
            results: of the run, its checkpoint saved.

        Returns:
            The results with the healed model, which are in ``results.json`` too.

        Raises:
            OutputError: the healed model cannot be written.
        """
        assert results.recommended is not None
        recommended, place = results.recommended, results.out / HEALED_FOLDER
        try:
            healing = self._trained(results.out / CHECKPOINT_FOLDER, place)
        except ModelError as error:
            why = f"the {recommended.state} model is not healed: {error}"
            warnings.warn(why, stacklevel=3)
            results = replace(results, recommended=replace(recommended, unhealed=why))
            results.save()
            return results
        dtype: Any = results.scan.model.dtype if results.scan.model else "auto"
        source = ModelSource(place, dtype, trust_remote_code=self.trust_remote_code)
        model, tokenizer = source.load()
        healed = self._loss(model, tokenizer)
        told = tuple(
            replace(one, healed=continue_text(model, tokenizer, one.prompt))
            for one in results.continuations
        )
        recommended = replace(recommended, healed=healed)
        results = replace(results, recommended=recommended, continuations=told, healing=healing)
        results.save()
        return results

    def _trained(self, checkpoint: Path, place: Path) -> Healing:
        """Train, unless that was done before the run was cut short."""
        goes_on = self.goes_on and place.exists()
        if goes_on:
            known = Healing.load(place)
            if known.weights == stored_digest(checkpoint):
                return known  # else it is of a run that this one has replaced
        compares = self.recipe.distill or self.recipe.objective != "lm"
        original = self.original if compares else None  # nobody else needs it now
        return heal(
            checkpoint, self.texts, place, recipe=self.recipe, eval_texts=self.choosing,
            original=original, merge=True, overwrite=self.overwrite or goes_on,
            progress=self.progress,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

    def _loss(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Loss:
        """The loss of the healed model, measured as those of the run."""
        decoder = Decoder.of(model)
        tokens = fitting_tokens(decoder, self.tokens)
        judge = LossJudge(judged_batches(tokenizer, self.report, tokens))
        rejected = len(self.report) - judge.num_items
        return loss_as_it_is(Layerwise(decoder), judge, num_rejected=rejected)
