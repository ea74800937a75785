"""Speech: how near a cut's text is to the whole model's, on the words of either."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TextsError
from ..values.schema import fields_of, finite, of_type, plain
from .scores import Difference, Scores

WAYS = ("greedy", "sampled")
"""How words are chosen: the likeliest token each time, or one drawn by its probability."""

ON_WORDS = ("agreement", "acceptance", "divergence", "loss", "departure")
"""Measures on the words of the whole model; all are by token but the last, by prompt."""

OF_OWN = ("loss_under_whole", "repetition", "length", "ends")
"""Measures of a model's own words."""

MEASURES = (*ON_WORDS, *OF_OWN)

OF_WHOLE = ("repetition", "length")
"""What is known of the words of the whole model beside them."""

GRAM = 4
"""Tokens in a row whose repetition is counted."""


@dataclass(frozen=True, slots=True)
class Speech:
    """The words of a model beside those of the whole one, on prompts, as measures of how near.

    Every measure is known by prompt, of words that were chosen in each of two ways; a mean is
    over both, and its error over prompts.

    On the words of the whole model: ``agreement``, the share of tokens at which both have the same
    likeliest one; ``acceptance``, 1 − TV(p, q), the share that speculative decoding would accept
    (2211.17192, corollary 3.6); ``divergence``, KL(p ‖ q) in nats a token; ``loss``, nats a token;
    ``departure``, the tokens before the first at which the likeliest ones differ, or all of them.
    Of its own words: ``loss_under_whole``, nats a token by the whole model; ``repetition``, the
    share of 4-grams of tokens that were there before; ``length`` in tokens; ``ends``, the share of
    prompts at which both end by themselves, or neither.

    Attributes:
        num_tokens: tokens of an answer at most.
        seed: of what is drawn.
        words: SHA-256 of what the whole model said, and of the prompts.
        scores: by way, and by measure. ``loss_under_whole`` is missing until the whole model has
            judged the words; where layers are streamed, so are all measures of the cut's own words.
        whole: by way, ``repetition`` and ``length`` of the words of the whole model.
        by_token: by way and measure by token, an array for every prompt; None where it was read.
    """

    num_tokens: int
    seed: int
    words: str
    scores: Mapping[str, Mapping[str, Scores]]
    whole: Mapping[str, Mapping[str, Scores]]
    by_token: Mapping[str, Mapping[str, Sequence[NDArray[np.float64]]]] | None = field(
        default=None, compare=False, repr=False
    )

    @property
    def num_prompts(self) -> int:
        """Prompts that were answered."""
        return len(self.scores[WAYS[0]]["agreement"].sums)

    def of(self, measure: str, way: str | None = None) -> Scores:
        """Give a measure by prompt, of one way or of both together; NaN where it is missing."""
        if measure in OF_OWN and measure not in self.scores[WAYS[0]]:
            return Scores(np.full(self.num_prompts, np.nan), np.ones(self.num_prompts))
        return _together(self.scores, measure, way)

    def of_whole(self, measure: str, way: str | None = None) -> Scores:
        """Give ``repetition`` or ``length`` of the whole model by prompt."""
        return _together(self.whole, measure, way)

    def mean(self, measure: str) -> float:
        """The mean of a measure over both ways."""
        return self.of(measure).mean

    @property
    def repeats(self) -> bool:
        """Whether it repeats itself more than twice as much as the whole model, and no tie."""
        own, whole = self.of("repetition"), self.of_whole("repetition")
        return own.mean > 2 * whole.mean and not own.minus(whole).tied

    def minus(self, other: "Speech") -> dict[str, Difference]:
        """The difference of every measure to another model on the same words, paired by prompt.

        TextsError: they are of different words.
        """
        if self.words != other.words:
            raise TextsError(
                "speech of different words cannot be paired: measure both on the same prompts, "
                "against the same whole model, with the same seed"
            )
        return {name: self.of(name).minus(other.of(name)) for name in MEASURES}

    def to_json(self) -> dict[str, Any]:
        """Give all means with their errors as plain JSON values; None where they are not finite.

        Over both ways, and under ``greedy`` and ``sampled`` of each; ``whole`` has the repetition
        and the length of the whole model's words.
        """
        ways = {
            way: {name: finite(one.mean) for name, one in of_way.items()}
            for way, of_way in self.scores.items()
        }
        whole = {name: self.of_whole(name) for name in OF_WHOLE}
        return {
            **_figures({name: self.of(name) for name in self.scores[WAYS[0]]}),
            "prompts": self.num_prompts,
            "tokens": int(self.of("agreement").weights.sum()),
            "num_tokens": self.num_tokens,
            "seed": self.seed,
            "words": self.words,
            **ways,
            "whole": _figures(whole),
        }

    def to_record(self) -> dict[str, Any]:
        """Give :meth:`to_json` with ``by_prompt``, from which it can be read again."""
        by_prompt = {"scores": self.scores, "whole": self.whole}
        return {**self.to_json(), "by_prompt": plain(by_prompt)}

    @classmethod
    def from_json(cls, data: Any) -> "Speech":
        """Read what :meth:`to_record` gave; raises KeyError, TypeError, ValueError."""
        known = of_type(dict, of_type(dict, data)["by_prompt"])
        speech = cls(**fields_of(cls, {**data, **known, "by_token": None}))
        own = OF_OWN if OF_OWN[0] in speech.scores.get(WAYS[0], ()) else ()
        for found, names in ((speech.scores, (*ON_WORDS, *own)), (speech.whole, OF_WHOLE)):
            if {*found} != {*WAYS} or any({*one} != {*names} for one in found.values()):
                raise ValueError(f"expected {', '.join(names)} of {' and '.join(WAYS)}")
            if {len(one.sums) for of_way in found.values() for one in of_way.values()} != {
                speech.num_prompts
            }:
                raise ValueError("measures of different numbers of prompts")
        return speech


def repeated(words: Sequence[int]) -> tuple[int, int]:
    """Count the 4-grams of tokens that were there before, and all of them."""
    grams = [tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]
    return len(grams) - len({*grams}), len(grams)


def _together(found: Mapping[str, Mapping[str, Scores]], measure: str, way: str | None) -> Scores:
    if way is not None:
        return found[way][measure]
    first, second = (found[one][measure] for one in WAYS)
    return Scores(first.sums + second.sums, first.weights + second.weights)


def _figures(scores: Mapping[str, Scores]) -> dict[str, Any]:
    means = {name: finite(one.mean) for name, one in scores.items()}
    return {**means, "stderr": {name: finite(one.stderr) for name, one in scores.items()}}


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, and how a model continued it.

    Attributes:
        given: token ids of the prompt, at least one.
        written: token ids of the answer, that which ends it among them.
        ended: whether it ended by itself, not because it had as many tokens as were allowed.
    """

    given: tuple[int, ...]
    written: tuple[int, ...]
    ended: bool

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of the prompt with the answer behind it."""
        return self.given + self.written
