"""Perplexity: that of one long text in windows, as published for WikiText."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import TextsError
from ..values.counts import with_error
from ..values.schema import fields_of, finite, plain
from .scores import Difference, Scores


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The loss of a model on one text, tokenised as a whole and cut into windows.

    Attributes:
        context: tokens of a window. Windows stand side by side: the stride is that of the text in
            one, ``context`` less 1 where there is a beginning-of-text token.
        bos: whether every window begins with the beginning-of-text token.
        num_rest: tokens at the end of the text that fill no window, and do not count.
        by_window: the nats and the predicted tokens of every window.
    """

    context: int
    bos: bool
    num_rest: int
    by_window: Scores = field(compare=False, repr=False)

    @property
    def stride(self) -> int:
        """Tokens of the text from the start of one window to that of the next."""
        return self.context - self.bos

    @property
    def nats(self) -> float:
        """The mean loss over predicted tokens."""
        return self.by_window.mean

    @property
    def value(self) -> float:
        """The perplexity, exp(nats); infinite where that is no float64."""
        return math.exp(self.nats) if self.nats < 709 else math.inf

    @property
    def stderr(self) -> float:
        """The standard error of the perplexity, over windows, to first order."""
        return self.value * self.by_window.stderr

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""
        return int(self.by_window.weights.sum())

    def minus(self, other: "Perplexity") -> Difference:
        """The difference in nats a token to another model on the same text, paired by window.

        exp of it is the ratio of the two perplexities. TextsError: the windows differ.
        """
        mine, theirs = self.by_window.weights, other.by_window.weights
        if (self.context, self.bos) != (other.context, other.bos) or not np.array_equal(
            mine, theirs
        ):
            raise TextsError(
                f"perplexities cannot be paired: {len(mine)} windows of {self.context} tokens, and "
                f"{len(theirs)} of {other.context}; measure both on the same text (context, "
                f"--context; bos, --bos)"
            )
        return self.by_window.minus(other.by_window)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; None where they are not finite."""
        return {
            "perplexity": finite(self.value),
            "stderr": finite(self.stderr),
            "nats": self.nats,
            "context": self.context,
            "stride": self.stride,
            "bos": self.bos,
            "num_windows": len(self.by_window),
            "num_tokens": self.num_tokens,
            "num_rest": self.num_rest,
        }

    def to_record(self) -> dict[str, Any]:
        """As :meth:`to_json`, with ``by_window``, so that :meth:`from_json` reads all of it."""
        return {**self.to_json(), "by_window": plain(self.by_window)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Perplexity":
        """Read what :meth:`to_record` gave; raises KeyError, TypeError, ValueError."""
        return cls(**fields_of(cls, data))

    def __str__(self) -> str:
        return with_error(self.value, self.stderr, 3)
