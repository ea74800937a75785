"""The judges of a study on one model that is loaded: of its texts, or of items of its own."""

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from ..evaluation.loss import fitting_tokens
from ..judgement.judges import judge_of
from ..judgement.judges.judge import Judge
from ..models.decoder import Decoder
from ..progress import track
from ..results.speech import Answer
from ..texts.batches import TokenisedText
from ..texts.prompts import Prompt
from ..values.entries import ResultStore
from ..values.tokens import Tokens
from .answers import KeptAnswers
from .speaking import SpeechOnPrompts
from .study import Study


class Judges:
    """Makes judges of the selection set and of the test set; the whole model speaks once for them.

    Making one of speech raises as :func:`shallower.texts.prompts.prompt_ids` and
    :func:`shallower.evaluation.answers.write_answers`.
    """

    def __init__(
        self,
        study: Study[Any],
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokens: Tokens,
        store: ResultStore,
    ) -> None:
        self._study, self._decoder, self._tokenizer = study, decoder, tokenizer
        self._tokens, self._store = tokens, store
        self._said: dict[int, list[tuple[Answer, ...]]] = {}

    def choosing(self, texts: Sequence[TokenisedText]) -> Judge:
        """The judge that cuts are chosen by, on the selection texts or items."""
        return self._judge(texts, 0)

    def reporting(self, texts: Sequence[TokenisedText]) -> Judge:
        """The judge that scores cuts beside their loss, on the test texts or items."""
        return self._judge(texts, 1)

    def _judge(self, texts: Sequence[TokenisedText], half: int) -> Judge:
        name = self._study.judges[half]
        if name != "speech":
            items = self._study.items[half]
            return judge_of(name, self._tokenizer, texts, tokens=self._tokens, items=items)
        said = self._answers(half)
        longest = max(len(one.ids) for answers in said for one in answers)
        tokens = fitting_tokens(self._decoder, Tokens(longest, self._study.settings.batch_size))
        return judge_of(name, self._tokenizer, texts, tokens=tokens, items=said)

    def _answers(self, half: int) -> list[tuple[Answer, ...]]:
        """What the whole model says to each selection prompt, or each test prompt."""
        if half not in self._said:
            prompts = cast(Sequence[Prompt], self._study.items[half])
            speaking = SpeechOnPrompts.of_study(self._study, prompts).speaking(self._tokenizer)
            write = KeptAnswers(self._store).write
            with track("generate, whole model", speaking.most_tokens, self._study.progress):
                words = speaking.words(self._decoder, write)
            self._said[half] = list(zip(*words.values(), strict=True))
        return self._said[half]
