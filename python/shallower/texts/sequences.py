"""Texts to training sequences: packed or truncated, in an order that the seed alone decides."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import length_hint
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import TextsError
from ..values.counts import counted
from ..values.identity import TextsIdentity
from ..values.plan import describe_rejections
from ..values.recipe import GLOBAL_BATCH
from ..values.tokens import Tokens
from .batches import TokenBatches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not predicted, as everywhere in transformers."""

_WHOLE = 1 << 30
"""More tokens than any text has."""


class ReadOnce:
    """Texts that are read from their source once, however often they are iterated.

    What a pass has read is kept for the next one, until :meth:`last_pass`. Raises TextsError for
    what is no iterable of strings.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise TextsError(f"texts must be an iterable of strings, got {type(texts).__name__}")
        self._source = texts
        self._read: list[str] = []
        self._rest = iter(texts)

    def __iter__(self) -> Iterator[str]:
        yield from self._read
        for text in self._rest:
            self._read.append(text)
            yield text

    def __length_hint__(self) -> int:
        """The hint of the source, for an ETA; 0 where nothing is known."""
        return length_hint(self._source)

    def last_pass(self) -> Iterator[str]:
        """All texts, of which no more are kept."""
        return chain(self._read, self._rest)


@dataclass(frozen=True, slots=True)
class Samples:
    """Sequences of token ids.

    Attributes:
        rows: token ids, (T,) uint32 each.
        identity: the identity of the texts that were read for them.
    """

    rows: Sequence[NDArray[np.uint32]]
    identity: TextsIdentity

    def __len__(self) -> int:
        return len(self.rows)


def read_samples(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Iterable[str],
    *,
    max_length: int,
    packing: bool,
    num_samples: int,
) -> Samples:
    """Read texts until they make ``num_samples`` sequences, or end.

    Packed: every sequence begins where a document does, and is filled up to ``max_length`` with
    the next ones, each with the end-of-text token behind it. What does not fit of the last is set
    aside; where the texts end too early, the rests are one stream, cut into the sequences that are
    missing, and what is left of it is left out. Else every text of at least two tokens is one
    sequence, truncated.

    Raises:
        TextsError: there are too few tokens for one step, a text is not a string, or the
            tokenizer has no end-of-text token to pack with.
    """
    limit = _WHOLE if packing else max_length
    batches = TokenBatches(tokenizer, texts, Tokens(limit, 64), min_tokens=1 if packing else 2)
    if packing:
        end = tokenizer.eos_token_id
        if not isinstance(end, int):
            raise TextsError(
                "the tokenizer has no end-of-text token to pack documents with: truncate them "
                "instead (packing=False, --no-packing)"
            )
        rows = _packed(batches, end, max_length, num_samples)
    else:
        rows = _truncated(batches, num_samples)
    if len(rows) < GLOBAL_BATCH:
        raise _too_few(batches, len(rows), max_length, packing)
    return Samples(rows, replace(batches.identity, max_length=max_length))


def _packed(
    batches: TokenBatches, end: int, max_length: int, num_samples: int
) -> list[NDArray[np.uint32]]:
    rows: list[NDArray[np.uint32]] = []
    parts: list[NDArray[np.uint32]] = []
    rests: list[NDArray[np.uint32]] = []
    room, spare = max_length, num_samples * max_length
    for ids in batches.token_ids():
        document = np.append(ids, end).astype(np.uint32)
        parts.append(document[:room])
        rest = document[room : room + spare]
        room -= len(parts[-1])
        if len(rest):
            rests.append(rest)
            spare -= len(rest)
        if not room:
            rows.append(np.concatenate(parts))
            parts, room = [], max_length
        if len(rows) == num_samples:
            return rows
    stream = np.concatenate([*parts, *rests]) if parts or rests else np.empty(0, np.uint32)
    whole = min(len(stream) // max_length, num_samples - len(rows))
    return [*rows, *stream[: whole * max_length].reshape(whole, max_length)]


def _truncated(batches: TokenBatches, num_samples: int) -> list[NDArray[np.uint32]]:
    rows: list[NDArray[np.uint32]] = []
    for ids in batches.token_ids():
        rows.append(ids.astype(np.uint32))
        if len(rows) == num_samples:
            break
    return rows


def _too_few(batches: TokenBatches, count: int, max_length: int, packing: bool) -> TextsError:
    if not batches.num_texts:
        return TextsError("there are no texts to heal with")
    said = ""
    if batches.num_rejected:
        said = "; " + describe_rejections(
            batches.num_rejected, batches.num_texts, batches.rejections
        )
    kind = (
        f"sequences of {counted(max_length, 'token')}"
        if packing
        else "texts of at least two tokens"
    )
    return TextsError(
        f"{counted(batches.num_texts, 'text')} make {count} {kind}, and one step takes "
        f"{GLOBAL_BATCH}: give more texts"
        + (", or shorter sequences (max_length, heal --max-length)" if packing else "")
        + said
    )


def order(count: int, total: int, seed: int) -> NDArray[np.int64]:
    """Draw (total,) indices below ``count``, the order in which samples are taken.

    All samples are taken once, shuffled, before any is taken again, shuffled anew.
    """
    passes = -(-total // count)
    shuffled = [
        np.random.default_rng((seed, number)).permutation(count) for number in range(passes)
    ]
    return np.concatenate(shuffled)[:total].astype(np.int64)


def collate(rows: Iterable[NDArray[np.uint32]]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Pad (T,) token ids to ``input_ids``, ``attention_mask`` and ``labels``, (B, T) int64 each.

    Padded on the right with token 0, which is never predicted; nor is the first token, so that
    labels count what is predicted, whether they are shifted or not.
    """
    rows = list(rows)
    shape = len(rows), max(len(row) for row in rows)
    ids = np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    labels = np.where(mask == 1, ids, IGNORED)
    labels[:, 0] = IGNORED
    return iter((("input_ids", ids), ("attention_mask", mask), ("labels", labels)))
