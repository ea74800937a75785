"""The two numbers that decide how texts become batches of token ids."""

from dataclasses import dataclass
from typing import Literal

from ..errors import TextsError

DEFAULT_BATCH = 8
"""Texts in one forward where model and device do not decide."""

SPEECH_TOKENS = 64
"""Tokens of an answer to a prompt at most, by default."""

BatchSize = int | Literal["auto"]


def parse_batch_size(text: str) -> BatchSize:
    """Read ``auto`` or a number of texts in one forward, at least 1."""
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise TextsError(
            f"batch_size (--batch-size) is {text!r}: expected auto or an integer of at least 1"
        )
    return int(text)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Length of texts at most, and their number in one forward."""

    max_length: int = 256  # tokens; longer texts are truncated
    batch_size: BatchSize = "auto"  # `auto`: as memory allows, on a CPU 8 at most

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size"):
            value = getattr(self, name)
            if name == "batch_size" and value == "auto":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TextsError(f"{name} must be an integer of at least 1, got {value!r}")

    @property
    def texts(self) -> int:
        """The number of texts in one forward; 8 where it is still ``auto``."""
        return DEFAULT_BATCH if self.batch_size == "auto" else self.batch_size
