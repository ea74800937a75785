"""What models said to prompts, kept by content: a part that was written once is not again."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CacheError
from ..progress import track
from ..values.answers import Answer
from ..values.hashing import hash_of
from ..values.schema import of_type, read
from ..values.tokens import BatchSize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from ..judgement.trials import ResultStore
    from ..models.decoder import Decoder

AT_ONCE = 32
"""Prompts that are answered together, and kept."""


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
        from ..evaluation.answers import check_prompts, check_speaks, ends_of, write_answers

        check_speaks(decoder)
        check_prompts(decoder, prompts, num_tokens)
        found: list[Answer] = []
        settings = {
            "num_tokens": num_tokens,
            "seed": seed,
            "batch_size": batch_size,
            "ends": ends_of(decoder.model, tokenizer),
        }
        with track(description, len(prompts), progress) as advance:
            for start in range(0, len(prompts), AT_ONCE):
                some = prompts[start : start + AT_ONCE]
                ids = [one.tolist() for one in some]
                inputs = {"prompts": hash_of(ids), **settings}
                known = self.store.get("answers", inputs)
                if known is None:
                    answers = write_answers(
                        decoder,
                        tokenizer,
                        some,
                        num_tokens=num_tokens,
                        seed=seed,
                        batch_size=batch_size,
                        progress=False,
                    )
                    self.store.put("answers", inputs, {"answers": [asdict(one) for one in answers]})
                else:
                    answers = _read(known, ids)
                found += answers
                advance(len(some))
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
