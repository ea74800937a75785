"""The two numbers by which texts become batches of token ids."""

from dataclasses import dataclass

from ..errors import TextsError


@dataclass(frozen=True, slots=True)
class Tokens:
    """Length of texts at most, and their number in one forward.

    Attributes:
        max_length: tokens of a text at most; longer texts are truncated.
        batch_size: texts in one forward.

    Raises:
        TextsError: one of them is not an integer of at least 1.
    """

    max_length: int = 256
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TextsError(f"{name} must be an integer of at least 1, got {value!r}")
