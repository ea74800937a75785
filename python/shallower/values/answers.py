"""Answers of a model to prompts, as the token ids that it was given and that it wrote."""

from dataclasses import dataclass


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
