"""Batches that are halved where the memory of a device does not hold their forward."""

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ..errors import ModelError
from ..texts.batches import Batch

Result = TypeVar("Result")


class Halving:
    """Forwards of batches, in parts that are no larger than the device has taken so far.

    A text has the same states and losses in a batch of any size, but for the rounding of its
    products, so that a scan or an evaluation goes on with smaller batches.
    """

    def __init__(self) -> None:
        self._texts: int | None = None

    def run(
        self, batch: Batch, forward: Callable[[Batch], Result]
    ) -> Iterator[tuple[Batch, Result]]:
        """Run a batch, in as many parts as it takes.

        Args:
            batch: texts padded to one length.
            forward: what is done with each part; it leaves nothing behind when it fails.

        Yields:
            The parts in their order, with what ``forward`` gave.

        Raises:
            ModelError: there is no memory for a single text.
        """
        waiting = [batch]
        while waiting:
            part, *rest = waiting.pop().split(self._texts or len(batch))
            waiting += rest[::-1]
            done: list[Result] = []
            try:
                done.append(forward(part))
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise _too_long(part) from error
            if done:  # and no error, whose traceback would hold the tensors of the forward
                yield part, done.pop()
            else:
                self._shrink(len(part))
                waiting.append(part)

    def _shrink(self, texts: int) -> None:
        """Go on with half of the texts that were too many."""
        self._texts = (texts + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # in pieces of the wrong sizes
        warnings.warn(
            f"there is not enough memory for {texts} texts in one forward: going on with "
            f"{self._texts} (batch_size, --batch-size)",
            stacklevel=2,
        )


def _too_long(batch: Batch) -> ModelError:
    return ModelError(
        f"there is not enough memory for the forward of one text of {batch.input_ids.shape[1]} "
        f"tokens: shorten texts (max_length, --max-length), quantise the weights (dtype, --dtype "
        f"nf4), or spread them over more devices (device_map, --device-map)"
    )
