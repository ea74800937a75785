"""The held-out loss of a model, and of the cuts that were tried."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from .layers import Block
from .schema import finite


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
    """

    nats: float
    stderr: float
    num_tokens: int
    num_texts: int
    num_rejected: int
    vocab_size: int

    @property
    def normalized(self) -> float:
        """The loss divided by ln(vocabulary): 1.0 is a uniform guess."""
        return self.nats / math.log(self.vocab_size)

    @property
    def normalized_stderr(self) -> float:
        """The standard error divided by ln(vocabulary)."""
        return self.stderr / math.log(self.vocab_size)

    def to_json(self) -> dict[str, Any]:
        """Give the loss as plain JSON values.

        Returns:
            The fields and ``normalized``; an error that is not finite is None.
        """
        return {**asdict(self), "stderr": finite(self.stderr), "normalized": self.normalized}

    def __str__(self) -> str:
        error = f" ± {self.stderr:.3f}" if math.isfinite(self.stderr) else ""
        return f"{self.nats:.3f}{error}"


@dataclass(frozen=True, slots=True)
class Cut:
    """A block and the held-out loss of the model without it."""

    strategy: str
    block: Block
    loss: Loss

    def to_json(self) -> dict[str, Any]:
        """Give the cut as plain JSON values.

        Returns:
            ``strategy``, ``drop`` (a block) and ``loss``.
        """
        return {
            "strategy": self.strategy,
            "drop": self.block.to_json(),
            "loss": self.loss.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The held-out loss of the whole model and of every cut that was tried."""

    base: Loss
    cuts: tuple[Cut, ...]

    def to_json(self) -> dict[str, Any]:
        """Give the comparison as plain JSON values.

        Returns:
            ``base`` (a loss) and ``cuts``.
        """
        return {"base": self.base.to_json(), "cuts": [cut.to_json() for cut in self.cuts]}


def with_error(value: float | None, stderr: float | None, digits: int = 4) -> str:
    """``0.1234 ± 0.0012``; the error left out where there is none."""
    if value is None:
        return "–"
    if stderr is None or not math.isfinite(stderr):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"
