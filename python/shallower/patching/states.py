"""The texts of a patch as batches, and the states of two models on them, in files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import TextsError
from ..models.layerwise import rows
from ..texts.batches import Batch, TokenBatches, untouched
from ..values.tokens import Tokens

MAX_HELD_OUT = 8192
"""Tokens on which choices are made, at most."""


def divide(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_length: int,
    batch_size: int,
    num_tokens: int,
) -> tuple[list[Batch], list[Batch]]:
    """Divide texts into batches to fit and batches held out, every eighth text.

    Args:
        tokenizer: the tokenizer of the model.
        texts: any iterable of strings; as many are read as are needed.
        max_length: tokens of a text at most.
        batch_size: texts in a batch.
        num_tokens: tokens to fit, at most.

    Returns:
        Batches to fit, and batches held out.

    Raises:
        TextsError: there are too few texts.
    """
    counts = [0, 0]
    enough = (num_tokens, min(MAX_HELD_OUT, num_tokens))
    parts: tuple[list[tuple[int, str]], list[tuple[int, str]]] = ([], [])
    for index, text in enumerate(texts):
        held = index % 8 == 7
        if counts[0] >= enough[0] and counts[1] >= enough[1]:
            break
        if counts[held] < enough[held]:
            with untouched(tokenizer):
                encoded = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            parts[held].append((len(encoded), text))
            counts[held] += len(encoded)
    # Texts of one length together: less padding.
    fitted, held_out = (
        list(
            TokenBatches(
                tokenizer,
                [text for _, text in sorted(part)],
                Tokens(max_length, batch_size),
                min_tokens=2,
            )
        )
        for part in parts
    )
    if not fitted or not held_out:
        raise TextsError(
            f"{len(parts[0]) + len(parts[1])} texts are too few to fit and to hold out: give at "
            f"least 8 with two tokens each, better some thousand"
        )
    return fitted, held_out


class Stored:
    """States of batches on the CPU, in memory or in one temporary file.

    Args:
        file: the file to make; None for memory.
        batches: the batches.
        width: D.
        dtype: dtype of the states.
    """

    def __init__(
        self, file: Path | None, batches: Sequence[Batch], width: int, dtype: torch.dtype
    ) -> None:
        sizes = [batch.input_ids.size * width for batch in batches]
        if file is None:
            whole = torch.empty(sum(sizes), dtype=dtype)
        else:
            whole = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=dtype)
        self._parts = [
            part.view(*batch.input_ids.shape, width)
            for part, batch in zip(whole.split(sizes), batches, strict=True)
        ]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._parts[index]

    def __setitem__(self, index: int, states: torch.Tensor) -> None:
        self._parts[index].copy_(states)


@dataclass(slots=True)
class StateSet:
    """Batches with the states of the whole and of the cut model after the same layers.

    Attributes:
        batches: token ids.
        whole: states of the whole model, (B, T, D) a batch.
        cut: states of the cut model, (B, T, D) a batch.
    """

    batches: Sequence[Batch]
    whole: Stored
    cut: Stored


def first_rows(batch: Batch, states: torch.Tensor) -> torch.Tensor:
    """Take the states of the first tokens of the texts.

    Args:
        batch: padded on the right.
        states: (B, T, D), on any device.

    Returns:
        (B, D).
    """
    mask = np.zeros(batch.input_ids.shape, dtype=bool)
    mask[:, 0] = True
    return rows(states, mask)


def other_rows(batch: Batch, states: torch.Tensor) -> torch.Tensor:
    """Take the states of all tokens but the first and the padding.

    Args:
        batch: padded on the right.
        states: (B, T, D), on any device.

    Returns:
        (N, D).
    """
    mask = batch.attention_mask.astype(bool)
    mask[:, 0] = False
    return rows(states, mask)
