"""The text that the models of a study generate beside the whole one, and samples of it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError, TextsError
from ..evaluation.answers import check_at_hand, check_prompts
from ..evaluation.kept import ResultStore
from ..evaluation.speech import SPEECH_TOKENS, Reference, Speaking, Spoken
from ..models.decoder import Decoder
from ..reporting.results import Continuations
from ..texts.prompts import Prompt, prompt_ids
from ..values.speech import Speech
from .answers import KeptAnswers
from .study import Study

NUM_SAMPLES = 4
"""Prompts whose answers are shown."""


def speaking_on(
    study: Study[Any], tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> Speaking:
    """How models speak in a study on some prompts; raises as :func:`prompt_ids`."""
    return Speaking(
        tokenizer,
        prompt_ids(tokenizer, prompts),
        num_tokens=SPEECH_TOKENS,
        seed=study.settings.seed,
        batch_size=study.settings.batch_size,
        progress=study.progress,
    )


@dataclass
class StudySpeech:
    """How models speak on the prompts of a study; no model is held.

    Attributes:
        study: whose prompts they are.
        tokenizer: of all models.
        reference: the words of the whole model, and its states at them.
        whole: how the whole model speaks.
    """

    study: Study[Any]
    tokenizer: PreTrainedTokenizerBase
    reference: Reference
    whole: Speech

    @staticmethod
    def is_possible(
        study: Study[Any], decoder: Decoder, tokenizer: PreTrainedTokenizerBase
    ) -> bool:
        """Whether the model of a study can answer its prompts.

        A warning says why it cannot answer our own; ModelError or TextsError why given ones.
        """
        if not study.prompts:
            return False
        try:
            check_at_hand(decoder)
            check_prompts(decoder, prompt_ids(tokenizer, study.prompts), SPEECH_TOKENS)
        except (ModelError, TextsError) as error:
            if study.settings.prompts is not None:
                raise
            warnings.warn(f"no speech is measured: {error}", stacklevel=2)
            return False
        return True

    @classmethod
    def of(
        cls,
        study: Study[Any],
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        store: ResultStore,
    ) -> "StudySpeech":
        """Let the whole model speak; what it said before is looked up."""
        speaking = speaking_on(study, tokenizer, study.prompts)
        reference = Reference.of(speaking, decoder, KeptAnswers(store).write)
        itself = reference.compare(decoder, decoder, name="whole model")
        return cls(study, tokenizer, reference, reference.judged(itself, decoder))

    def hear(self, model: PreTrainedModel, name: str) -> Spoken:
        """Let a model speak, as it is now."""
        return self.reference.compare(Decoder.of(model), name=name)

    def judged(self, spoken: Spoken, whole: PreTrainedModel) -> Speech:
        """Let the whole model judge what was said."""
        return self.reference.judged(spoken, Decoder.of(whole))

    def samples(self, said: Mapping[str, Spoken]) -> tuple[Continuations, ...]:
        """Show what the whole model and others said, greedily, to the first prompts."""
        words = {
            "whole": self.reference.words,
            **{name: one.own or {} for name, one in said.items()},
        }
        found = []
        for place, prompt in enumerate(self.study.prompts[:NUM_SAMPLES]):
            texts = {name: self._text(one["greedy"][place].written) for name, one in words.items()}
            found.append(Continuations(prompt.shown(self.tokenizer), **texts))
        return tuple(found)

    def _text(self, written: Sequence[int]) -> str:
        return str(self.tokenizer.decode([*written], skip_special_tokens=True))
