"""The held-out loss of a model, and of the cuts that were tried."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TextsError
from ..values.counts import with_error
from ..values.schema import fields_of, finite, of_type, plain
from .scores import UNKNOWN, Difference, Estimate, Scores

TextLoss = tuple[int, float, int]
"""The index of a text, its nats over all tokens but the first, and their number."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The mean next-token loss over texts.

    Attributes:
        nats: mean over all predicted tokens, in nats a token.
        stderr: standard error of ``nats``; texts are the independent units, tokens of one
            text are not. NaN for a single text.
        num_tokens: tokens predicted.
        num_texts: texts that count.
        num_rejected: texts with fewer than two tokens.
        vocab_size: size of the vocabulary that the model predicts over.
        by_text: the nats and the predicted tokens of every text, in the order of the texts; None
            where they are not known, as of a loss from the record of a healing.
        bytes_by_text: (S,) float64, the bytes in UTF-8 of what is predicted of every text; None
            where they were not counted.
    """

    nats: float
    stderr: float
    num_tokens: int
    num_texts: int
    num_rejected: int
    vocab_size: int
    by_text: Scores | None = field(default=None, compare=False, repr=False)
    bytes_by_text: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of_scores(
        cls,
        by_text: Scores,
        num_bytes: NDArray[np.float64] | None = None,
        *,
        num_rejected: int,
        vocab_size: int,
    ) -> "Loss":
        """Give the nats and tokens of all texts as a loss, with bytes where they are known."""
        counts = int(by_text.weights.sum()), len(by_text), num_rejected, vocab_size
        return cls(by_text.mean, by_text.stderr, *counts, by_text, num_bytes)

    @property
    def by_byte(self) -> Scores | None:
        """The bits and the bytes of every text, a measure that compares across vocabularies."""
        if self.by_text is None or self.bytes_by_text is None:
            return None
        return Scores(self.by_text.sums / math.log(2), self.bytes_by_text)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of text; None where bytes are not known."""
        return None if self.by_byte is None else self.by_byte.mean

    @property
    def normalized(self) -> float:
        """The loss divided by ln(vocabulary): 1.0 is a uniform guess."""
        return self.nats / math.log(self.vocab_size)

    @property
    def normalized_stderr(self) -> float:
        """The standard error divided by ln(vocabulary)."""
        return self.stderr / math.log(self.vocab_size)

    def to_figures(self) -> dict[str, Any]:
        """Give the fields but those by text, and ``normalized``, as plain JSON values.

        They are known of every loss, wherever it is from. An error that is not finite is None.
        """
        figures = {name: getattr(self, name) for name in FIGURES}
        return {**figures, "stderr": finite(self.stderr), "normalized": self.normalized}

    def to_json(self) -> dict[str, Any]:
        """Give the figures as plain JSON values, and of bytes, where they are known.

        Those are ``bits_per_byte``, ``bits_per_byte_stderr`` and ``num_bytes``.
        """
        plain = self.to_figures()
        if self.by_byte is not None:
            plain["bits_per_byte"] = finite(self.by_byte.mean)
            plain["bits_per_byte_stderr"] = finite(self.by_byte.stderr)
            plain["num_bytes"] = int(self.by_byte.weights.sum())
        return plain

    def to_record(self) -> dict[str, Any]:
        """Give :meth:`to_json` with ``by_text``, from which all of the loss can be read again."""
        by_text = plain(self.by_text)
        if by_text and self.bytes_by_text is not None:
            by_text["bytes"] = self.bytes_by_text.tolist()
        return {**self.to_json(), "by_text": by_text}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Loss":
        """Read what :meth:`to_json` or :meth:`to_record` gave; ``by_text`` only of a record.

        Raises TypeError, KeyError; ValueError if there is not a number of tokens for every sum.
        """
        by_text = of_type(dict, data).get("by_text")
        num_bytes = by_text and of_type(dict, by_text).get("bytes")
        values = {**data, "by_text": by_text, "bytes_by_text": num_bytes}
        loss = cls(**fields_of(cls, values, nan=("stderr",)))
        texts = None if loss.by_text is None else len(loss.by_text.sums)
        if loss.bytes_by_text is not None and len(loss.bytes_by_text) != texts:
            raise ValueError(f"{texts} sums of {len(loss.bytes_by_text)} texts")
        return loss

    def minus(self, other: "Loss") -> Difference:
        """Compare with another loss on the same texts, by the same tokenizer, in nats a token.

        The paired difference has its own standard error: texts that are hard for both count for
        nothing. Raises TextsError if a loss is not known by text, or the two are of different
        texts.
        """
        if self.by_text is None or other.by_text is None:
            raise TextsError(
                "a loss has no values by text, so no difference can be paired: measure both "
                "with evaluate_loss"
            )
        if not np.array_equal(self.by_text.weights, other.by_text.weights):
            raise TextsError(
                f"the losses are of different texts, or of another tokenizer: {self.num_tokens} "
                f"tokens of {self.num_texts} texts, and {other.num_tokens} of {other.num_texts}; "
                f"measure both on the same"
            )
        return self.by_text.minus(other.by_text)

    def __str__(self) -> str:
        return with_error(self.nats, self.stderr, 3)


TEST_SET, OUT_OF_DOMAIN = "the test set", "out-of-domain texts"
"""Texts that losses are measured on."""


def recovered(losses: Mapping[str, Loss]) -> Estimate:
    """Estimate the share of the lost nats that came back in the last state of a cut.

    ``losses`` by state begin with ``whole`` and ``cut``; NaN if these are all, or nothing was lost.
    """
    by_text = [loss.by_text for loss in losses.values() if loss.by_text is not None]
    return by_text[-1].recovered(by_text[1], by_text[0]) if len(by_text) > 2 else UNKNOWN


FIGURES = tuple(one.name for one in fields(Loss) if one.compare)
"""Names of the figures of a loss, all that it has beside what is known by text."""
