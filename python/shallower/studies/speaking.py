"""Speech as a measure: what a model generates beside the whole one, on prompts, with samples."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from ..errors import ModelError, TextsError
from ..models.source import ModelSource
from ..results.speech import Answer, Speech
from ..settings.stages import EvalSettings
from ..store.inputs import model_inputs
from ..store.store import Store
from ..texts.prompts import Prompt, prompt_ids, prompts_fingerprint, read_prompts
from ..values.plan import Plan
from ..values.tokens import SPEECH_TOKENS, BatchSize, Tokens
from .answers import KeptAnswers
from .measures import Measure, bar_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from ..evaluation.speech import Reference, Speaking, Spoken
    from ..forecasts.speed import Work
    from ..models.decoder import Decoder
    from ..reporting.story import PromptSample
    from ..values.entries import ResultStore
    from .measures import Loaded
    from .study import Study

PROMPT_TOKENS = 448
"""Tokens of a prompt that a model goes on from, that memory is planned for."""

NUM_SAMPLES = 4
"""Prompts whose answers are shown."""


@dataclass
class SpeechOnPrompts(Measure[Speech]):
    """How a model speaks beside the whole one; no model is held.

    ``whole`` is the whole model where that is another checkpoint; ``reference`` are its words, and
    its states at them.
    """

    prompts: Sequence[Prompt]
    num_tokens: int = SPEECH_TOKENS
    seed: int = 0
    batch_size: BatchSize = "auto"
    whole: ModelSource | None = None
    source: str | None = None
    progress: bool | None = None
    reference: "Reference | None" = field(default=None, init=False, repr=False, compare=False)
    kind = option = "speech"
    item = "prompt"
    result = Speech
    needs_whole = True

    @classmethod
    def of(cls, what: str, settings: EvalSettings, *, is_shared: bool) -> Self:
        """Read the prompts, or ours."""
        place, num_tokens = what or None, settings.speech_tokens
        prompts, size = read_prompts(place), settings.batch_size
        return cls(prompts, num_tokens, settings.seed, size, source=place)

    @classmethod
    def of_study(cls, study: "Study[Any]", prompts: Sequence[Prompt]) -> Self:
        """Let the models of a study speak on prompts."""
        settings = study.settings
        own: Any = {"seed": settings.seed, "batch_size": settings.batch_size}
        return cls(prompts, SPEECH_TOKENS, progress=study.progress, **own)

    @property
    def tokens(self) -> Tokens:  # type: ignore[override]
        """The length of a prompt with its answer that memory is planned for."""
        return Tokens(PROMPT_TOKENS + self.num_tokens, self.batch_size)

    def inputs(self, store: Store) -> Mapping[str, Any] | None:
        """Identify the prompts by their content, and the other checkpoint."""
        whole = None if self.whole is None else model_inputs(self.whole, store)
        if self.whole is not None and whole is None:
            return None
        return {
            "prompts": prompts_fingerprint(self.prompts),
            "num_tokens": self.num_tokens,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "whole": whole,
        }

    def token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> "Iterator[NDArray[np.int64]]":
        """Yield the token ids of every prompt."""
        yield from prompt_ids(tokenizer, self.prompts)

    def work(self, lengths: "NDArray[np.int64]", *, layers: int, whole: int) -> "Work":
        """Count what both say, and what both run on it."""
        from ..forecasts.work import spoken

        return spoken(layers, whole, lengths, num_tokens=self.num_tokens)

    def speaking(
        self, tokenizer: "PreTrainedTokenizerBase", batch_size: BatchSize | None = None
    ) -> "Speaking":
        """Prepare models to speak; raises as :func:`prompt_ids`."""
        from ..evaluation.speech import Speaking

        ids, size = prompt_ids(tokenizer, self.prompts), batch_size or self.batch_size
        return Speaking(tokenizer, ids, self.num_tokens, self.seed, size, self.progress)

    def take_reference(self, loaded: "Loaded", *, tokens: Tokens, store: "ResultStore") -> None:
        """Let the whole model speak, and keep its states at its words."""
        from ..evaluation.speech import Reference

        if self.reference is None:
            speaking = self.speaking(loaded[1], tokens.batch_size)
            self.reference = Reference.of(speaking, loaded[0], KeptAnswers(store).write)

    def measure(
        self, loaded: "Loaded", *, tokens: Tokens, plan: Plan | None, store: "ResultStore | None"
    ) -> "Spoken":
        """Compare a model with the whole one, and let it speak."""
        whole = loaded[0] if self.whole is None and plan is None else None
        return self.compare(loaded[0], bar_of("model", plan), whole)

    def compare(self, decoder: "Decoder", name: str, whole: "Decoder | None" = None) -> "Spoken":
        """Compare a model as it is now with the whole one, and let it speak."""
        assert self.reference is not None
        return self.reference.compare(decoder, whole, name=name)

    def complete(self, value: "Spoken", decoder: "Decoder") -> Speech:
        """Let the whole model judge what was said."""
        assert self.reference is not None
        return self.reference.judged(value, decoder)

    def samples(self, said: "Mapping[str, Spoken]") -> "tuple[PromptSample, ...]":
        """Show what the whole model and others said, greedily, to the first prompts."""
        from ..reporting.story import PromptSample

        reference = self.reference
        assert reference is not None
        tokenizer: Any = reference.speaking.tokenizer
        words = {"whole": reference.words, **{name: own or {} for name, (_, own) in said.items()}}

        def text(answers: Mapping[str, Sequence[Answer]], place: int) -> str:
            written = [*answers["greedy"][place].written]
            return str(tokenizer.decode(written, skip_special_tokens=True))

        return tuple(
            PromptSample(
                prompt.shown(tokenizer), {name: text(one, place) for name, one in words.items()}
            )
            for place, prompt in enumerate(self.prompts[:NUM_SAMPLES])
        )


def speech_of(
    study: "Study[Any]", decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase"
) -> SpeechOnPrompts | None:
    """Speech on the prompts of a study; None without prompts, or where a model has no answers.

    A warning says why it cannot answer our own; ModelError or TextsError why given ones.
    """
    from ..evaluation.answers import check_at_hand, check_prompts

    if not study.prompts:
        return None
    speech = SpeechOnPrompts.of_study(study, study.prompts)
    try:
        check_at_hand(decoder)
        check_prompts(decoder, prompt_ids(tokenizer, speech.prompts), speech.num_tokens)
    except (ModelError, TextsError) as error:
        if study.settings.prompts is not None:
            raise
        warnings.warn(f"no speech is measured: {error}", stacklevel=2)
        return None
    return speech
