"""What models said to prompts, kept by content: a part that was written once is not again.

Evaluations, judges, patches and healings share the answers: each prompt has random numbers of its
own, so no answer depends on its batch.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import CacheError, ModelError, TextsError
from ..progress import part, track
from ..results.speech import Answer
from ..texts.prompts import (
    Prompt,
    has_template,
    prompt_ids,
    prompts_fingerprint,
    training_prompts,
)
from ..texts.sequences import answered
from ..values.counts import counted
from ..values.provenance import hash_of
from ..values.schema import of_type, read
from ..values.tokens import BatchSize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from ..models.decoder import Decoder
    from ..values.entries import ResultStore

AT_ONCE = 32
"""Prompts that are answered together, and kept."""

ANSWER_TOKENS = 256
"""Tokens of an answer to train on, at most."""

PATCH_ANSWERS = 64
"""Prompts of our own that are answered for a patch: a tenth of what it fits, or more."""

TEXTS_SHARE = 8
"""Tokens of texts that a patch is fitted on, for each of those answers, at least."""

MOST_ANSWERS, ANSWERS_A_STEP = 2048, 8
"""Prompts of our own that are answered for a training, at most, and for a step of it."""

BEGINNING = 120
"""Characters of a text that a model without a template for chats goes on from."""


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """The answers of one model, looked up in its store or written into it, part by part."""

    store: "ResultStore"

    def write(
        self,
        decoder: "Decoder",
        tokenizer: "PreTrainedTokenizerBase",
        prompts: "Sequence[NDArray[np.int64]]",
        *,
        num_tokens: int,
        seed: int | None = None,
        batch_size: BatchSize = "auto",
        progress: bool | None = None,
        description: str = "answers",
    ) -> list[Answer]:
        """Answer prompts as :func:`write_answers`; CacheError where the store is damaged."""
        from ..evaluation.answers import check_generates, check_prompts, ends_of, write_answers

        check_generates(decoder)
        check_prompts(decoder, prompts, num_tokens)
        # In passes over layers on disk all answers go on.
        at_once = len(prompts) if decoder.is_streamed else AT_ONCE
        found: list[Answer] = []
        settings = {
            "num_tokens": num_tokens,
            "seed": seed,
            "batch_size": batch_size,
            "ends": ends_of(decoder.model, tokenizer),
        }
        with track(description, len(prompts) * num_tokens, progress):
            for start in range(0, len(prompts), at_once):
                some = prompts[start : start + at_once]
                ids = [one.tolist() for one in some]
                inputs = {"prompts": hash_of(ids), **settings}
                with part(len(some) * num_tokens):
                    known = self.store.get("answers", inputs)
                    if known is not None:
                        found += _read(known, ids)
                        continue
                    answers = write_answers(
                        decoder,
                        tokenizer,
                        some,
                        num_tokens=num_tokens,
                        seed=seed,
                        batch_size=batch_size,
                        description=description,
                    )
                self.store.put("answers", inputs, {"answers": [asdict(one) for one in answers]})
                found += answers
        return found


def _read(known: dict[str, Any], prompts: list[list[int]]) -> list[Answer]:
    """The answers to prompts, as they were kept."""
    try:
        answers = [read(Answer, one) for one in of_type(list, known["answers"])]
        if [[*one.given] for one in answers] != prompts or not all(one.written for one in answers):
            raise ValueError("expected an answer to each of the prompts")
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"an entry of the cache is no answers: {error}") from error
    return answers


def answers_for(steps: int | None) -> int:
    """Say how many prompts of our own are answered for so many steps, or for a patch.

    Whole parts, so that other steps find those that there are.
    """
    if steps is None:
        return PATCH_ANSWERS
    return min(MOST_ANSWERS, -(-ANSWERS_A_STEP * steps // AT_ONCE) * AT_ONCE)


@dataclass(frozen=True, slots=True)
class WantedAnswers:
    """Answers that a cut is to be patched or trained on, beside texts.

    ``prompts`` may have their answers already; None stands for ``count`` of our own at most, or the
    beginnings of texts. ``chats_only`` asks no model without a chat template, or without room.
    """

    prompts: Sequence[Prompt] | None
    count: int
    num_tokens: int = ANSWER_TOKENS
    seed: int = 0
    chats_only: bool = False

    def __str__(self) -> str:
        if self.are_there:
            return f"{len(self.prompts or ())} of a file"
        if self.prompts is None:
            return f"to {counted(self.count, 'prompt')} of our own, or beginnings of texts"
        return f"to {counted(len(self.prompts), 'prompt')}"

    @property
    def are_there(self) -> bool:
        """Whether a file has the answers already, so that nothing is to be written."""
        return any(one.answer is not None for one in self.prompts or ())

    @property
    def num_written(self) -> int:
        """The tokens that are written at most."""
        prompts = self.count if self.prompts is None else len(self.prompts)
        return 0 if self.are_there else prompts * self.num_tokens

    @property
    def inputs(self) -> dict[str, Any]:
        """All that they depend on beside the model and the texts."""
        prompts = None if self.prompts is None else prompts_fingerprint(self.prompts)
        return {**asdict(replace(self, prompts=None)), "prompts": prompts}

    def within(self, num_tokens: float) -> "WantedAnswers":
        """The same to fewer prompts, unless asked for: of an eighth of so many tokens of texts."""
        most = int(num_tokens / TEXTS_SHARE / self.num_tokens)
        return replace(self, count=min(self.count, most)) if self.chats_only else self

    def is_for(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether a model with this tokenizer is asked for them."""
        return not self.chats_only or has_template(tokenizer)

    def of(
        self, decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase"
    ) -> "WantedAnswers | None":
        """The same for a model; None where it is asked for none, of which a warning says why if it
        chats.
        """
        if not self.chats_only:
            return self
        if not self.is_for(tokenizer):
            return None
        try:
            self.check(decoder, tokenizer, ())
        except (ModelError, TextsError) as error:
            warnings.warn(f"no answers are learned from: {error}", stacklevel=2)
            return None
        return self

    def check(
        self, decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]
    ) -> None:
        """Refuse what :meth:`by` would, before any long work; raises as it does."""
        if self.are_there:
            self._read(decoder, tokenizer)
        elif self.num_written:
            self._asked(decoder, tokenizer, texts)

    def by(
        self,
        decoder: "Decoder",
        tokenizer: "PreTrainedTokenizerBase",
        texts: Iterable[str],
        *,
        store: "ResultStore",
        progress: bool | None = None,
    ) -> list[Answer]:
        """Let the whole model answer, or look up what it said; read what is there already.

        Raises TextsError and ModelError as :func:`write_answers` and :func:`answered`.
        """
        if self.are_there:
            return self._read(decoder, tokenizer)
        if not self.num_written:
            return []
        return KeptAnswers(store).write(
            decoder,
            tokenizer,
            self._asked(decoder, tokenizer, texts),
            num_tokens=self.num_tokens,
            seed=self.seed,
            progress=progress,
            description="generate answers to train on",
        )

    def _read(self, decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase") -> list[Answer]:
        return answered(tokenizer, self.prompts or (), model=decoder.identity)

    def _asked(
        self, decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]
    ) -> "list[NDArray[np.int64]]":
        """The token ids of the prompts."""
        from ..evaluation.answers import check_at_hand, check_prompts

        check_at_hand(decoder)
        ids = prompt_ids(tokenizer, self._prompts(tokenizer, texts))
        check_prompts(decoder, ids, self.num_tokens)
        return ids

    def _prompts(
        self, tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]
    ) -> Sequence[Prompt]:
        if self.prompts is not None:
            return self.prompts
        if has_template(tokenizer):
            return training_prompts(self.count, self.seed)
        written = (text for text in texts if text.strip())
        found = [_beginning(text) for text in islice(written, self.count)]
        if not found:
            raise TextsError(
                "the tokenizer has no chat template for prompts of our own, and there are no texts "
                "whose beginnings the model could go on from: give some, or prompts (answers, "
                "--answers PROMPTS)"
            )
        return [Prompt(text=text) for text in found]


def _beginning(text: str) -> str:
    """The first words of a text."""
    begun = text.strip()[:BEGINNING]
    return begun.rsplit(maxsplit=1)[0] if len(begun) == BEGINNING else begun
