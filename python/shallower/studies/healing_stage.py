"""The healing of a run's checkpoint, and what it is worth on the test texts."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cutting.cards import state_loss
from ..cutting.source import CARD_FILE
from ..errors import ModelError
from ..evaluation.batches import UnsavedResults
from ..evaluation.loss import measure_loss
from ..evaluation.speech import Spoken
from ..healing.checks import require_healable
from ..healing.heal import heal
from ..judgement.held_out_cuts import out_of_domain
from ..memory.device import free_memory
from ..models.decoder import Decoder
from ..models.identity import stored_digest, stored_dtype
from ..models.source import ModelSource
from ..reporting.results import Run
from ..results.healing import Healing
from ..results.loss import Loss
from ..results.speech import Answer
from ..settings.recipe import Recipe
from ..settings.studies import RunSettings
from ..store.given_models import ModelStore
from ..values.files import CHECKPOINT_FOLDER, HEALED_FOLDER
from .speaking import SpeechOnPrompts
from .study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_recipe(model: "PreTrainedModel", heal_steps: int | None, seed: int) -> Recipe:
    """The default recipe in the dtype of the whole model, float16 as bfloat16."""
    dtype: Any = stored_dtype(model)
    recipe = Recipe(dtype="bfloat16" if dtype == "float16" else dtype, seed=seed)
    return recipe if heal_steps is None else replace(recipe, steps=heal_steps)


@dataclass
class HealingStage:
    """The stage of a run that trains adapters on its checkpoint, and merges them.

    :meth:`check` comes before any long work, :meth:`heal` when the whole model may leave memory.
    """

    study: Study[RunSettings]
    recipe: Recipe

    def __post_init__(self) -> None:
        self.texts = self.study.training_texts()

    def check(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, answers: bool
    ) -> None:
        """Refuse before all work what the healing would refuse, as :func:`require_healable`.

        ``answers`` says whether there will be some.
        """
        require_healable(model, tokenizer, self.texts, recipe=self.recipe, answers=answers)

    def heal(
        self, results: Run, speech: SpeechOnPrompts | None, answers: Sequence[Answer] | None = None
    ) -> Run:
        """Train the checkpoint, and measure the healed model, reloaded; also how it speaks.

        ``answers``, if any, are trained on, too. If that does not help, a warning says so, and the
        checkpoint stays recommended.
        """
        assert results.recommended is not None
        recommended, place = results.recommended, results.out / HEALED_FOLDER
        try:
            healing = self._trained(results.out / CHECKPOINT_FOLDER, place, answers)
        except ModelError as error:
            why = f"the {recommended.state} model is not healed: {error}"
            warnings.warn(why, stacklevel=3)
            results = replace(results, recommended=replace(recommended, unhealed=why))
            results.save()
            return results
        dtype: Any = results.scan.model.dtype if results.scan.model else "auto"
        source = ModelSource(place, dtype, trust_remote_code=self.study.origin[1])
        model, tokenizer = source.load(self.study.progress)
        healed, outside = self._loss(source, model, tokenizer), recommended.out_of_domain
        how: Any = {"tokens": self.study.settings.tokens, "progress": self.study.progress}
        outside = outside and out_of_domain(outside, "healed", model, tokenizer=tokenizer, **how)
        both = [outside[name] for name in ("whole", "healed") if outside]
        state_loss(place / CARD_FILE, (results.whole, healed, *both), tested=self.study.tested)
        recommended = replace(recommended, healed=healed, out_of_domain=outside)
        results = replace(results, recommended=recommended, healing=healing)
        if speech is not None:
            try:
                said = speech.compare(Decoder.of(model), "healed")
            except ModelError as error:  # of another dtype than the whole one
                why = f"the speech of the healed model is not measured: {error}"
                warnings.warn(why, stacklevel=3)
            else:
                del model  # the whole one needs its memory
                results = self._with_speech(results, speech, said)
        results.save()
        return results

    def _with_speech(self, results: Run, speech: SpeechOnPrompts, said: Spoken) -> Run:
        """Add how the healed model speaks, judged by the whole one, which is loaded for it."""
        free_memory()
        whole = Decoder.of(self.study.load(self.study.model)[0])
        spoken = speech.complete(said, whole)
        samples = zip(results.continuations, speech.samples({"healed": said}), strict=True)
        return replace(
            results,
            speech={**results.speech, "healed": spoken},
            continuations=tuple(
                replace(one, continued={**one.continued, **more.continued}) for one, more in samples
            ),
        )

    def _trained(self, checkpoint: Path, place: Path, answers: Sequence[Answer] | None) -> Healing:
        """Train, unless that was done before the run was cut short."""
        study, goes_on = self.study, self.study.goes_on and place.exists()
        if goes_on:
            known = Healing.load(place)
            if known.weights == stored_digest(checkpoint):
                return known  # else it is of a run that this one has replaced
        name, trusted = study.origin
        original = None if self.recipe.objective == "lm" else name  # nobody else needs it now
        return heal(
            checkpoint,
            self.texts,
            place,
            answers=answers,
            recipe=self.recipe,
            eval_texts=study.split.choose,
            original=original,
            merge=True,
            overwrite=study.overwrite or goes_on,
            progress=study.progress,
            trust_remote_code=trusted,
        )

    def _loss(
        self, source: ModelSource, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
    ) -> Loss:
        """The loss of the healed model, measured and cached as those of the run."""
        study, decoder, kept = self.study, Decoder.of(model), UnsavedResults()
        how: Any = {"tokens": study.settings.tokens, "store": kept, "progress": study.progress}
        loss = measure_loss(decoder, tokenizer, study.split.report, **how)
        kept.keep(partial(ModelStore.of, cache=study.store), source, decoder.identity.dtype)
        return replace(loss, bytes_by_text=None)
