"""Texts and answers to training sequences: packed or truncated, in an order that the seed decides.

Of texts all tokens but the first are predicted, of answers those that were written.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from operator import length_hint
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import RejectedSamplesWarning, TextsError
from ..processes import is_main_process
from ..results.speech import Answer
from ..settings.recipe import GLOBAL_BATCH
from ..values.counts import counted
from ..values.identity import AnswersIdentity, ModelIdentity, TextsIdentity
from ..values.plan import Rejection, describe_rejections
from ..values.tokens import Tokens
from .batches import AnyTexts, TokenBatches, TokenisedText, tokenise
from .prompts import Prompt, answer_ids, prompt_ids
from .splits import is_held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not predicted, as everywhere in transformers."""

_WHOLE = 1 << 30
"""More tokens than any text has."""


class ReadOnce:
    """Texts that are read from their source once; a pass is kept until :meth:`last_pass`."""

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
class Sample:
    """A sequence of tokens."""

    ids: NDArray[np.uint32]  # (T,)
    predicted: NDArray[np.bool_] | None = None  # (T,); by default all but the first, which never is

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Samples:
    """Sequences of tokens."""

    rows: Sequence[Sample]  # of texts, then of answers
    identity: TextsIdentity  # of the texts that were read for them
    num_text_rows: int
    answers: AnswersIdentity | None = None

    def __len__(self) -> int:
        return len(self.rows)


def read_samples(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Iterable[str],
    *,
    max_length: int,
    packing: bool,
    num_samples: int,
    answers: Sequence[Answer] = (),
    share: float | None = None,
) -> Samples:
    """Read texts until they make ``num_samples`` sequences, or end.

    With answers, which :func:`usable_answers` gave, a ``share`` of the sequences is left to them;
    all of them are taken, however many that is. Packed, every sequence begins where a document
    does, and is filled up to ``max_length``: by the next ones with end-of-text tokens between them,
    then by what did not fit; of answers by whole ones.
    """
    turns = answers_turns(num_samples, share)
    wanted = int(np.count_nonzero(~turns))
    least = int(np.count_nonzero(~turns[:GLOBAL_BATCH]))
    texts = texts if wanted else ()
    end, limit = tokenizer.eos_token_id, _WHOLE if packing else max_length
    batches = TokenBatches(tokenizer, texts, Tokens(limit, 64), min_tokens=1 if packing else 2)
    if packing:
        if not isinstance(end, int):
            raise TextsError(
                "the tokenizer has no end-of-text token to pack documents with: truncate them "
                "instead (packing=False, --no-packing)"
            )
        rows = _packed(batches, end, max_length, wanted)
    else:
        rows = [ids.astype(np.uint32) for ids in islice(batches.token_ids(), wanted)]
    if len(rows) < least:
        raise _too_few(batches, len(rows), least, max_length if packing else None)
    samples = Samples(
        [Sample(ids) for ids in rows], replace(batches.identity, max_length=max_length), len(rows)
    )
    if share is None:
        return samples
    rests = _joined(answers, max_length, end) if packing else _apart(answers, max_length)
    known = _identity(answers, max_length)
    return replace(samples, rows=[*samples.rows, *rests], answers=known)


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


def _too_few(batches: TokenBatches, number: int, least: int, packed_to: int | None) -> TextsError:
    if not batches.num_texts:
        return TextsError("there are no texts to heal with")
    said = ""
    if batches.num_rejected:
        said = "; " + describe_rejections(
            batches.num_rejected, batches.num_texts, batches.rejections
        )
    kind = (
        f"sequences of {counted(packed_to, 'token')}"
        if packed_to
        else "texts of at least two tokens"
    )
    return TextsError(
        f"{counted(batches.num_texts, 'text')} make {number} {kind}, and one step takes "
        f"{least}: give more texts"
        + (", or shorter sequences (max_length, heal --max-length)" if packed_to else "")
        + said
    )


# Answers
def usable_answers(answers: Sequence[Answer], max_length: int) -> list[Answer]:
    """List the answers of which ``max_length`` tokens have one to predict; warn of the others."""
    check_answers(answers)
    kept, left_out = [], []
    for index, one in enumerate(answers):
        if reason := _unusable(one, max_length):
            left_out.append(Rejection(index, reason))
        else:
            kept.append(one)
    said = ""
    if left_out:
        said = ": " + describe_rejections(len(left_out), len(answers), left_out)
    if not kept:
        raise TextsError(
            f"there are no answers to learn from{said}; give some with tokens, behind prompts that "
            f"are shorter than a sequence of {counted(max_length, 'token')} (max_length, "
            f"--max-length)"
        )
    if left_out and is_main_process():
        warnings.warn(f"answers are left out{said}", RejectedSamplesWarning, stacklevel=3)
    return kept


def check_answers(answers: Iterable[object], vocab_size: int | None = None) -> None:
    """Refuse, by a TextsError, what is no answer, or holds tokens that the model does not have."""
    for index, one in enumerate(answers):
        if not isinstance(one, Answer):
            raise TextsError(f"answer {index} is of type {type(one).__name__}: expected Answer")
        unknown = [t for t in one.ids if vocab_size and not 0 <= t < vocab_size]
        if unknown:
            raise TextsError(
                f"the answers hold token {unknown[0]}, and the model has {vocab_size}: they are of "
                f"another model"
            )


def _unusable(answer: Answer, max_length: int) -> str | None:
    """Why nothing of an answer can be predicted; None if something can."""
    if not answer.given or not answer.written:
        return "no token of the answer" if answer.given else "no token of the prompt"
    if len(answer.given) >= max_length:
        return f"a prompt of {counted(len(answer.given), 'token')}"
    return None


def _apart(answers: Iterable[Answer], max_length: int, end: int | None = None) -> list[Sample]:
    """A sequence of each answer; if it has no end of its own, with ``end`` behind it."""
    found = []
    for one in answers:
        ids = np.array(one.ids, np.int64)
        predicted = np.arange(len(ids)) >= len(one.given)
        if end is not None and not one.ended:
            ids, predicted = np.append(ids, end), np.append(predicted, False)
        found.append(Sample(ids[:max_length].astype(np.uint32), predicted[:max_length]))
    return found


def _joined(answers: Iterable[Answer], max_length: int, end: int | None) -> list[Sample]:
    """Sequences of several answers, each in the first one that has room for it."""
    found = _apart(answers, max_length, end)
    rows: list[list[Sample]] = []
    rooms = np.full(len(found), max_length)
    for one in found:
        place = int(np.argmax(rooms[: len(rows) + 1] >= len(one)))
        rooms[place] -= len(one)
        if place == len(rows):
            rows.append([])
        rows[place].append(one)
    return [
        Sample(
            np.concatenate([one.ids for one in row]),
            np.concatenate([np.asarray(one.predicted) for one in row]),
        )
        for row in rows
    ]


def _identity(answers: Sequence[Answer], max_length: int) -> AnswersIdentity:
    """Count the tokens that are predicted; hash all of them, their prompts, and how they ended."""
    digest, num_tokens = hashlib.sha256(), 0
    for one in answers:
        given, written = len(one.given), len(one.written)
        digest.update(repr((given, written, bool(one.ended))).encode())
        digest.update(np.array(one.ids, np.int64).tobytes())
        num_tokens += min(written, max_length - given)
    return AnswersIdentity(len(answers), num_tokens, digest.hexdigest())


def answered(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], *, model: ModelIdentity | None
) -> list[Answer]:
    """Take the answers of a file's prompts, which are of the uncut ``model``, if it is known.

    A prompt that does not name a model is taken to be right. Where it does not say whether its
    answer ended, no end is learned, with a warning. A TextsError names the line of an answer of
    another model, or of none.
    """
    for index, one in enumerate(prompts):
        place = f"line {one.line}" if one.line else f"prompt {index}"
        if one.answer is None:
            raise TextsError(
                f"{place} has no answer: write the field `answer`, or leave it out of all lines, "
                f"so that the uncut model answers"
            )
        if model is not None and one.model is not None and not _is_name_of(one.model, model):
            raise TextsError(
                f"{place} is an answer of {one.model}, and the uncut model is {model.name} "
                f"({model.fingerprint[:12]}): give answers of that one, or name it so in the "
                f"field `model` if it is the same"
            )
    unknown = sum(one.ended is None for one in prompts)
    if unknown and is_main_process():
        warnings.warn(
            f"{unknown:,} of {counted(len(prompts), 'answer')} may have been cut off, so that "
            f"nothing is learned of how they end: write `ended`, true or false, in every line",
            stacklevel=2,
        )
    return [
        Answer(tuple(given.tolist()), tuple(answer_ids(tokenizer, one).tolist()), bool(one.ended))
        for one, given in zip(prompts, prompt_ids(tokenizer, prompts), strict=True)
    ]


def _is_name_of(name: str, model: ModelIdentity) -> bool:
    """Whether a model is meant: by its fingerprint, or the last part of its name or path."""
    last, expected = (one.rstrip("/").split("/")[-1].casefold() for one in (name, model.name))
    return name == model.fingerprint or last == expected


def mixed(
    tokenizer: "PreTrainedTokenizerBase",
    texts: AnyTexts,
    answers: Iterable[Answer],
    *,
    share: float,
    max_length: int,
) -> Iterator[TokenisedText]:
    """Yield texts and answers behind their prompts, to fit a patch on; none of them twice.

    Of what the patch holds out the ``share`` of answers is that of the rest. Where either are at
    their end, the others go on.
    """
    kinds = (
        tokenise(tokenizer, texts, max_length),
        (
            TokenisedText(str(tokenizer.decode(ids)), ids, max_length, len(one.given))
            for one in answers
            for ids in [np.array(one.ids, np.int64)[:max_length]]
        ),
    )
    taken = [0, 0]  # of the rest, and held out
    for index in count():
        held = is_held_out(index)
        turn = bool(answers_turns(1, share, first=taken[held])[0])
        found = next(kinds[turn], None) or next(kinds[not turn], None)
        if found is None:
            return
        taken[held] += 1
        yield found


# The order
def order(count: int, total: int, seed: int) -> NDArray[np.int64]:
    """Draw (total,) indices below ``count``: all are taken, shuffled, before any is taken again."""
    if not total:
        return np.empty(0, np.int64)
    passes = -(-total // count)
    shuffled = [
        np.random.default_rng((seed, number)).permutation(count) for number in range(passes)
    ]
    return np.concatenate(shuffled)[:total].astype(np.int64)


def answers_turns(total: int, share: float | None, first: int = 0) -> NDArray[np.bool_]:
    """Which of (total,) sequences from the ``first`` on are answers; none without a ``share``.

    The k-th is one where (k + 1) share and k share differ when they are rounded down.
    """
    floors = np.floor(np.arange(first, first + total + 1) * (share or 0.0))
    turns: NDArray[np.bool_] = floors[1:] > floors[:-1]
    return turns


def mixed_order(
    samples: Samples, total: int, *, share: float | None, seed: int
) -> NDArray[np.int64]:
    """Draw (total,) indices of rows, each kind by :func:`order`, with one share in every step."""
    turns = answers_turns(total, share)
    texts, answers = int(np.count_nonzero(~turns)), int(np.count_nonzero(turns))
    taken = np.empty(total, np.int64)
    taken[~turns] = order(samples.num_text_rows, texts, seed)
    taken[turns] = samples.num_text_rows + order(
        len(samples) - samples.num_text_rows, answers, seed
    )
    return taken


def collate(rows: Iterable[Sample]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Pad sequences to ``input_ids``, ``attention_mask`` and ``labels``, (B, T) int64 each.

    Padded on the right with token 0, which is never predicted; nor is the first token, so that
    labels count what is predicted, whether they are shifted or not.
    """
    rows = list(rows)
    shape = len(rows), max(len(row) for row in rows)
    ids = np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.int64)
    predicted = np.zeros(shape, np.bool_)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row.ids
        mask[index, : len(row)] = 1
        predicted[index, : len(row)] = True if row.predicted is None else row.predicted
    labels = np.where(predicted, ids, IGNORED)
    labels[:, 0] = IGNORED
    return iter((("input_ids", ids), ("attention_mask", mask), ("labels", labels)))
