"""Texts to padded batches of token ids, in constant memory.

Texts are read once. A window of batches is tokenised, sorted by length and cut into batches,
longest first; only the token ids of a text are kept, at most ``max_length``. Batches are padded on
the right, with token 0, which every vocabulary has. In a causal model no token sees what follows
it. So the states of a text are those it has alone, whatever the tokenizer's padding side and pad
token.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TextsError
from ..values.counts import counted
from ..values.identity import TextsIdentity
from ..values.plan import NAMED_REJECTIONS, Rejection
from ..values.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 16
"""Batches that are sorted by length together."""

FIRST_WINDOW = 32
"""Texts of the first window of a test set, so that its first 32 texts can be measured alone."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids of B texts, padded on the right to T tokens."""

    input_ids: NDArray[np.int64]  # (B, T)
    attention_mask: NDArray[np.int64]  # (B, T), 1 at tokens and 0 at padding
    samples: NDArray[np.int64]  # (B,), the index of every text among all texts
    # First tokens not predicted, (B,) or of all: the first, or a prompt.
    given: NDArray[np.int64] | int = 1

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def learned(self) -> NDArray[np.bool_]:
        """(B, T), true at the tokens from the last one that is given on, up to the padding."""
        first = np.broadcast_to(self.given, len(self))[:, None] - 1
        found: NDArray[np.bool_] = self.attention_mask.astype(bool)
        return found & (np.arange(self.input_ids.shape[1]) >= first)

    def split(self, num_texts: int) -> "list[Batch]":
        """Split into parts of at most ``num_texts``, without columns that are padding alone."""
        if num_texts >= len(self):
            return [self]
        parts = []
        for start in range(0, len(self), num_texts):
            rows = slice(start, start + num_texts)
            mask = self.attention_mask[rows]
            used = np.flatnonzero(mask.any(axis=0))
            columns = slice(used[0], used[-1] + 1)
            given = self.given if isinstance(self.given, int) else self.given[rows]
            some = self.input_ids[rows, columns], mask[:, columns], self.samples[rows]
            parts.append(Batch(*some, given))
        return parts


@dataclass(frozen=True, slots=True)
class TokenisedText:
    """A text with its first ``max_length`` token ids, (T,) int64, special tokens among them.

    The first ``given`` of them are not learned.
    """

    text: str
    ids: NDArray[np.int64]
    max_length: int
    given: int = 1


Unpadded = Sequence[tuple[int, NDArray[np.int64]]]
"""Texts of a batch: the index of each among all, and its (T,) token ids."""

AnyTexts = Iterable[str | TokenisedText]
"""Texts, or texts that are tokenised already."""


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", texts: AnyTexts, max_length: int
) -> Iterator[TokenisedText]:
    """Tokenise texts, one at a time, for all batches of them; what is tokenised already stays."""
    for index, text in enumerate(texts):
        if isinstance(text, TokenisedText):
            yield text
        else:
            (ids,), _ = _encoded(tokenizer, [text], max_length, first=index)
            yield TokenisedText(text, ids, max_length)


class TokenBatches:
    """An iterable of batches that reads texts once, a window of batches at a time.

    Texts that are tokenised already are not tokenised again. Texts of fewer than ``min_tokens``
    tokens are rejected: their number is ``num_rejected``, and ``rejections`` the first of them by
    name. A window is of ``window`` texts, by default of 16 batches. Those of a ``test_set`` begin
    with 32 texts, and double what was read until they are as large; the texts of its batches
    ascend.

    ``count_bytes`` fills ``predicted_bytes``, of plain texts alone: by the index of a text its
    bytes in UTF-8 behind its first token, up to the last one that is kept. A slow tokenizer does
    not say where tokens lie, and has none.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        texts: AnyTexts,
        tokens: Tokens,
        *,
        min_tokens: int = 1,
        count_bytes: bool = False,
        window: int | None = None,
        test_set: bool = False,
    ) -> None:
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise TextsError(f"texts must be an iterable of strings, got {type(texts).__name__}")
        self._tokenizer = tokenizer
        self._texts = iter(texts)
        self._max_length = tokens.max_length
        self._batch_size = tokens.texts
        self._window = window or WINDOW * tokens.texts
        self._is_test_set = test_set
        self._min_tokens = min_tokens
        self._num_special = tokenizer.num_special_tokens_to_add(pair=False)
        if self._max_length <= self._num_special:
            raise TextsError(
                f"max_length {self._max_length} leaves no room beside the {self._num_special} "
                f"special tokens that the tokenizer adds to every text"
            )
        self._hash = hashlib.sha256(f"max_length={self._max_length}".encode()).digest()
        self._count_bytes = count_bytes and bool(getattr(tokenizer, "is_fast", False))
        self.predicted_bytes: dict[int, int] = {}
        self.num_texts = 0
        self.num_rejected = 0
        self._taken = 0
        self.rejections: list[Rejection] = []

    @property
    def identity(self) -> TextsIdentity:
        """The number of texts read so far, the length limit, and a hash of all token ids."""
        return TextsIdentity(self.num_texts, self._max_length, self._hash.hex())

    def windows(self) -> Iterator[list[Batch]]:
        """Yield the batches that were sorted by length together, longest first."""
        for window in self.unpadded():
            yield [padded(texts) for texts in window]

    def unpadded(self) -> Iterator[list[Unpadded]]:
        """Yield the texts of the batches that :meth:`windows` yields."""
        while texts := list(islice(self._texts, self._next_window)):
            yield self._batches(self._tokenise(texts))

    @property
    def _next_window(self) -> int:
        """The texts of the next window."""
        if not self._is_test_set:
            return self._window
        return max(FIRST_WINDOW, min(self.num_texts, self._window))

    def __iter__(self) -> Iterator[Batch]:
        for window in self.windows():
            yield from window

    def token_ids(self) -> Iterator[NDArray[np.int64]]:
        """Yield (T,) int64 token ids, text by text as they come, without those rejected."""
        while texts := list(islice(self._texts, self._batch_size)):
            for _, ids in self._tokenise(texts):
                yield ids

    def skip(self, num_texts: int) -> TextsIdentity:
        """Read on until ``num_texts`` are read in all; the identity of all that were read."""
        while remaining := num_texts - self.num_texts:
            texts = list(islice(self._texts, min(remaining, self._window)))
            if not texts:
                break
            self._tokenise(texts)
        return self.identity

    def _tokenise(self, texts: Sequence[Any]) -> list[tuple[int, NDArray[np.int64]]]:
        accepted = []
        for offset in range(0, len(texts), self._batch_size):
            part = texts[offset : offset + self._batch_size]
            for text, ids, places in zip(part, *self._token_ids(part), strict=True):
                self._hash = hashlib.sha256(self._hash + ids.tobytes()).digest()
                is_empty = not (text.text if isinstance(text, TokenisedText) else text)
                if is_empty or len(ids) < self._min_tokens or len(ids) <= self._num_special:
                    self._reject("empty text" if is_empty else counted(len(ids), "token"))
                else:
                    accepted.append((self.num_texts, ids))
                    if self._count_bytes:
                        whole = len(ids) < self._max_length
                        count = _bytes_behind_first(text, places, whole=whole)
                        self.predicted_bytes[self.num_texts] = count
                self.num_texts += 1
        return accepted

    def _token_ids(self, texts: Sequence[Any]) -> tuple[list[NDArray[np.int64]], Sequence[Any]]:
        """The token ids of texts, and where their tokens lie in them, if bytes are counted."""
        if all(isinstance(text, TokenisedText) for text in texts):
            assert all(text.max_length == self._max_length for text in texts)
            return [text.ids for text in texts], [None] * len(texts)
        return _encoded(
            self._tokenizer,
            texts,
            self._max_length,
            first=self.num_texts,
            offsets=self._count_bytes,
        )

    def _reject(self, reason: str) -> None:
        self.num_rejected += 1
        if len(self.rejections) < NAMED_REJECTIONS:
            self.rejections.append(Rejection(self.num_texts, reason))

    def take_rejections(self) -> tuple[int, list[Rejection]]:
        """The number of rejections since the last call, and the first of them by name."""
        taken = self.num_rejected - self._taken, self.rejections[self._taken :]
        self._taken = self.num_rejected
        return taken

    def _batches(self, accepted: list[tuple[int, NDArray[np.int64]]]) -> list[Unpadded]:
        accepted.sort(key=lambda item: (-len(item[1]), item[0]))
        starts = range(0, len(accepted), self._batch_size)
        batches = (accepted[start : start + self._batch_size] for start in starts)
        return [sorted(one, key=itemgetter(0)) if self._is_test_set else one for one in batches]


def _encoded(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    max_length: int,
    *,
    first: int,
    offsets: bool = False,
) -> tuple[list[NDArray[np.int64]], Sequence[Any]]:
    """Token ids, (T,) int64 each, and where the tokens lie, of texts numbered from ``first`` on."""
    for index, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise TextsError(f"text {index} is of type {type(text).__name__}: expected str")
    try:
        with untouched(tokenizer):
            encoded = tokenizer(
                texts,
                truncation=True,
                max_length=max_length,
                return_attention_mask=False,
                return_offsets_mapping=offsets,
            )
    except Exception as error:  # tokenizers raises bare ones
        last = first + len(texts) - 1
        raise TextsError(f"cannot tokenise a text among {first} .. {last}: {error}") from error
    ids = [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]
    return ids, encoded["offset_mapping"] if offsets else [None] * len(ids)


def _bytes_behind_first(text: str, places: Sequence[tuple[int, int]], *, whole: bool) -> int:
    """Bytes of a text from the end of its first token on, which is no text if it is special."""
    end = len(text) if whole else max(stop for _, stop in places)
    return len(text[places[0][1] : end].encode())


def padded(texts: Unpadded, given: NDArray[np.int64] | int = 1) -> Batch:
    """Make a batch of at least one text, each its index among all and its (T,) token ids."""
    length = max(len(ids) for _, ids in texts)
    input_ids = np.zeros((len(texts), length), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, (_, ids) in enumerate(texts):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    return Batch(input_ids, attention_mask, np.array([sample for sample, _ in texts]), given)


@contextmanager
def untouched(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Restore in the end a fast tokenizer's truncation and padding, which its calls change."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.no_truncation()
        backend.no_padding()
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
