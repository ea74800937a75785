"""Speech: a cut continues prompts, compared with the whole model on the words of either.

Both models need not be in memory at once. The whole model generates first; its words and its final
states at them are kept on the CPU. The cut's head makes the whole model's logits from these states,
if it is the same head to the bit. The cut's own words are judged when the whole model is back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError, TextsError
from ..memory.plan import fitting
from ..memory.retry import Halving
from ..memory.streaming import Forwards
from ..models.architecture import evaluating
from ..models.decoder import Decoder
from ..models.head import Head
from ..progress import part, track
from ..results.scores import Scores
from ..results.speech import ON_WORDS, WAYS, Answer, Speech, repeated
from ..texts.batches import Batch, padded
from ..texts.prompts import Prompt, given_prompts, prompt_ids
from ..values.provenance import hash_of
from ..values.tokens import SPEECH_TOKENS, BatchSize, Tokens
from .answers import write_answers
from .loss import FORWARD, LOGITS_PER_CHUNK, predicting_tokens, summed_losses

READING = 4
"""Tokens that a model reads as fast as it generates one, about."""

Words = Mapping[str, Sequence[Answer]]
"""By way, the answers to all prompts, in their order."""

_BY_TOKEN = ON_WORDS[:-1]
_PROBED = 4
"""Rows by whose logits two heads are told apart."""

_ON_CARDS = 1 << 23
"""Logits of each of two models that a card compares at once, in float64: some 64 MiB an array."""


def evaluate_speech(
    model: PreTrainedModel | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Path | Iterable[str | Mapping[str, Any] | Prompt] | None = None,
    *,
    whole: PreTrainedModel | Decoder,
    num_tokens: int = SPEECH_TOKENS,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
) -> Speech:
    """Compare the text that a model generates with that of the whole one.

    The whole model answers every prompt twice, by its likeliest tokens and by tokens that are
    drawn; on these words both are compared token by token. Then the model answers them itself, and
    the whole one judges its words; not if its layers are streamed, since each token would take a
    pass over them. See :class:`shallower.Speech` for the measures.

    Args:
        model: a causal language model of transformers, as a cut, patched or healed.
        tokenizer: the tokenizer of both.
        prompts: a file of JSON lines with ``prompt`` or ``messages``, or an iterable of texts, of
            such objects or of both; by default prompts of our own, of four kinds.
        whole: the model that it is compared with; itself gives agreement and acceptance of 1.
        num_tokens: tokens of an answer at most.
        seed: of what is drawn.
        batch_size: texts in one forward; by default 32 prompts are answered at once.
        progress: bars with ETA on standard error; by default if that is a terminal.

    Returns:
        Every measure by prompt, with its mean and its error.

    Raises:
        TextsError: there are no prompts, or what is none; a chat without a template; a prompt that
            leaves no room for an answer.
        ModelError: a model cannot generate text, or its logits are not finite; or the two do not
            share a vocabulary.

    Example:
        >>> import copy
        >>> cut = copy.deepcopy(model)
        >>> plan = sh.drop_layers(cut, [range(12, 20)])
        >>> speech = sh.evaluate_speech(cut, tokenizer, ["Once"], whole=model, num_tokens=8)
        >>> print(f"accepted: {speech.mean('acceptance'):.0%}")
        accepted: ...%
    """
    of_whole, of_model = Decoder.of(whole), Decoder.of(model)
    ids = prompt_ids(tokenizer, given_prompts(prompts))
    speaking = Speaking(tokenizer, ids, num_tokens, seed, batch_size, progress)
    reference = Reference.of(speaking, of_whole)
    spoken = reference.compare(of_model, whole=of_whole)
    return reference.judged(spoken, of_whole)


@dataclass(frozen=True, slots=True)
class Speaking:
    """Models that speak on the same prompts, (P,) int64 token ids each; no two are in memory
    together.

    TextsError: a number that is out of range.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[NDArray[np.int64]]
    num_tokens: int = SPEECH_TOKENS
    seed: int = 0
    batch_size: BatchSize = "auto"
    progress: bool | None = None

    def __post_init__(self) -> None:
        Tokens(batch_size=self.batch_size)
        for name, value, least in (("num_tokens", self.num_tokens, 1), ("seed", self.seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise TextsError(f"{name} must be an integer of at least {least}, got {value!r}")

    @property
    def most_tokens(self) -> int:
        """The tokens that a model generates at most."""
        return len(WAYS) * len(self.prompts) * self.num_tokens

    @property
    def tokens_read(self) -> int:
        """How many of them take as long as all take to be read, about."""
        return self.most_tokens // READING

    def words(self, decoder: Decoder, write: Callable[..., list[Answer]] = write_answers) -> Words:
        """Let a model speak in each of the ways; ``write`` may look its words up.

        The bar around it advances by ``most_tokens``.
        """
        found = {}
        for way, seed in zip(WAYS, (None, self.seed), strict=True):
            with part(self.most_tokens / len(WAYS)):
                found[way] = write(
                    decoder,
                    self.tokenizer,
                    self.prompts,
                    num_tokens=self.num_tokens,
                    seed=seed,
                    batch_size=self.batch_size,
                    description=f"{way} words",
                )
        return found

    def batches(self, decoder: Decoder, words: Words) -> list["_Spans"]:
        """Make batches of all words behind their prompts, each as many as one forward holds."""
        every = [one for way in WAYS for one in words[way]]
        rows = [np.array(one.ids, np.int64) for one in every]
        tokens = Tokens(max(map(len, rows)), self.batch_size)
        size = fitting(decoder, tokens, FORWARD).texts
        order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
        found = []
        for start in range(0, len(order), size):
            some = order[start : start + size]
            given = np.array([len(every[index].given) for index in some])
            found.append(_Spans(padded([(index, rows[index]) for index in some], given)))
        return found


@dataclass(frozen=True, slots=True)
class _Spans:
    """Prompts with what was said, (B, T).

    ``kept`` are the whole model's states at what was said, on the CPU, if it said that.
    """

    batch: Batch
    kept: torch.Tensor | None = None

    def part(self, batch: Batch) -> "_Spans":
        """The same of some of its texts."""
        if batch is self.batch:
            return self
        places = {sample: place for place, sample in enumerate(self.batch.samples.tolist())}
        rows = [places[one] for one in batch.samples.tolist()]
        kept = self.kept
        if kept is not None:
            pieces = kept.split(self.predicting.sum(axis=1).tolist())
            kept = torch.cat([pieces[row] for row in rows])
        return _Spans(batch, kept)

    @property
    def predicting(self) -> NDArray[np.bool_]:
        """(B, T), true at the tokens that words are predicted from."""
        return predicting_tokens(self.batch)

    @property
    def expected(self) -> NDArray[np.int64]:
        """(R,) the words, text by text."""
        return np.roll(self.batch.input_ids, -1, axis=1)[self.predicting]

    @torch.inference_mode()
    def states(self, head: Head) -> torch.Tensor:
        """What a model's logits at the words are made of, (R, ...)."""
        device = head.decoder.device
        ids = torch.from_numpy(self.batch.input_ids).to(device)
        mask = torch.from_numpy(self.batch.attention_mask).to(device)
        return head.states_at(ids, mask, np.flatnonzero(self.predicting))


Spoken = tuple[Speech, Words | None]
"""How a model speaks, and its own words, if any, which the whole model has yet to judge."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The words of the whole model and its states at them, which outlive the model itself.

    By ``probe``, the first logits of the first batch, another head is told from its own.
    """

    speaking: Speaking
    words: Words
    parts: Sequence[_Spans]
    probe: torch.Tensor

    @classmethod
    def of(
        cls,
        speaking: Speaking,
        decoder: Decoder,
        write: Callable[..., list[Answer]] = write_answers,
    ) -> "Reference":
        """Let the whole model speak, and run it on its words; ``write`` may look them up."""
        head, parts = Head.of(decoder), []
        total = speaking.most_tokens + speaking.tokens_read
        with track("generate, whole model", total, speaking.progress):
            words = speaking.words(decoder, write)
            with part(speaking.tokens_read), evaluating(decoder.model):
                for spans, states in _run(
                    speaking.batches(decoder, words),
                    lambda one: one.states(head).cpu(),
                    ("read them", speaking.progress),
                    decoder,
                ):
                    parts.append(replace(spans, kept=states))
                probe = _probe(head, parts[0])
        return cls(speaking, words, parts, probe)

    @torch.inference_mode()
    def compare(self, decoder: Decoder, whole: Decoder | None = None, name: str = "cut") -> Spoken:
        """Measure a model on the words, and let it speak unless its layers are streamed from disk.

        ``whole`` makes the whole model's logits, by default this model's head, which must be the
        same. ModelError if it is not, or for logits that are not finite.
        """
        head = Head.of(decoder)
        its_head = None if whole is None else Head.of(whole)
        is_itself = whole is not None and whole.model is decoder.model
        speaks, speaking = not (is_itself or decoder.is_streamed), self.speaking
        found: dict[int, NDArray[np.float64]] = {}
        own = self.words if is_itself else None
        total = speaking.tokens_read + speaks * speaking.most_tokens
        does = "generate" if speaks else "read words"
        with track(f"{does}, {name}", total, speaking.progress):
            with (
                part(speaking.tokens_read),
                evaluating(decoder.model),
                evaluating((whole or decoder).model),
            ):
                self._check(head, its_head)
                for spans, rows in _run(
                    self.parts,
                    lambda one: _rows(one, head, its_head or head),
                    ("read the whole model's words", speaking.progress),
                    decoder,
                ):
                    pieces = np.split(rows, np.cumsum(spans.predicting.sum(axis=1))[:-1])
                    found.update(zip(spans.batch.samples.tolist(), pieces, strict=True))
            if speaks:
                own = speaking.words(decoder)
        return self._speech(found, own), own

    def judged(self, spoken: Spoken, decoder: Decoder) -> Speech:
        """Let the whole model judge what another one said, by its loss; ModelError as above."""
        speech, words = spoken
        if words is None:
            return speech
        head = Head.of(decoder)
        found: dict[int, float] = {}
        with evaluating(decoder.model):
            for spans, sums in _run(
                self.speaking.batches(decoder, words),
                lambda one: _finite(summed_losses(head, one.batch), head).tolist(),
                ("read by the whole model", self.speaking.progress),
                decoder,
            ):
                found.update(zip(spans.batch.samples.tolist(), sums, strict=True))
        scores = {}
        for place, way in enumerate(WAYS):
            own = words[way]
            nats = np.array([found[place * len(own) + index] for index in range(len(own))])
            tokens = np.array([len(one.written) for one in own], np.float64)
            scores[way] = {**speech.scores[way], "loss_under_whole": Scores(nats, tokens)}
        return replace(speech, scores=scores)

    def _check(self, head: Head, whole: Head | None) -> None:
        """Refuse a model of another vocabulary, or, without the whole one, of another head."""
        size = self.probe.shape[1]
        if head.vocab_size != size:
            raise ModelError(
                f"{type(head.decoder.model).__name__} predicts over {head.vocab_size:,} tokens, "
                f"and the whole model over {size:,}: compare models of one tokenizer"
            )
        if whole is None and not self._is_head(head):
            raise ModelError(
                "the model has another head, or another dtype, than the whole one, so that both "
                "are needed in memory to compare their words: load both in the same dtype, or "
                "compare them by evaluate_speech(model, tokenizer, whole=...)"
            )

    def _is_head(self, head: Head) -> bool:
        """Whether a head makes the whole model's logits."""
        try:
            return torch.equal(_probe(head, self.parts[0]), self.probe)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # of another dtype or size
            return False

    def _speech(self, found: Mapping[int, NDArray[np.float64]], own: Words | None) -> Speech:
        scores: dict[str, dict[str, Scores]] = {}
        by_token: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
        count = len(self.words[WAYS[0]])
        for place, way in enumerate(WAYS):
            rows = [found[place * count + index] for index in range(count)]
            tokens = np.array([len(one) for one in rows], np.float64)
            by_token[way] = {
                name: [one[:, column] for one in rows] for column, name in enumerate(_BY_TOKEN)
            }
            scores[way] = {
                name: Scores(np.array([one.sum() for one in values]), tokens)
                for name, values in by_token[way].items()
            }
            scores[way]["departure"] = _each([_departure(one[:, 0]) for one in rows])
            if own is not None:
                scores[way] |= _of_own(own[way])
                pairs = zip(self.words[way], own[way], strict=True)
                scores[way]["ends"] = _each([one.ended == other.ended for one, other in pairs])
        whole, speaking = {way: _of_own(self.words[way]) for way in WAYS}, self.speaking
        mark = hash_of({way: list(map(astuple, self.words[way])) for way in WAYS})
        return Speech(speaking.num_tokens, speaking.seed, mark, scores, whole, by_token)


def _run(
    spans: Sequence[_Spans],
    work: Callable[[_Spans], Any],
    bar: tuple[str, bool | None],
    decoder: Decoder,
) -> Iterator[tuple[_Spans, Any]]:
    """Do work on batches, in parts where memory is short, and yield the parts with its results."""
    halving = Halving()
    with track(bar[0], sum(len(one.batch) for one in spans), bar[1]) as advance:
        ready = Forwards(decoder).ready([one.batch] for one in spans)
        for one, _ in zip(spans, ready, strict=True):
            of_part = one.part
            for some, done in halving.run(one.batch, lambda some: work(of_part(some))):  # noqa: B023
                yield of_part(some), done
                advance(len(some))


@torch.inference_mode()
def _probe(head: Head, spans: _Spans) -> torch.Tensor:
    """The logits that a head makes of the first states."""
    assert spans.kept is not None
    return next(head.logits_from(spans.kept[:_PROBED].to(head.decoder.device))).float().cpu()


def _rows(spans: _Spans, head: Head, whole: Head) -> NDArray[np.float64]:
    """(R, M) the measures of every token."""
    assert spans.kept is not None
    expected, kept = torch.from_numpy(spans.expected), spans.kept.to(whole.decoder.device)
    rows: list[torch.Tensor] = []
    start = 0
    for of_whole, of_model in zip(
        whole.logits_from(kept), head.logits_from(spans.states(head)), strict=True
    ):
        words = expected[start : (start := start + len(of_model))]
        rows.append(measures(of_whole.to(of_model.device), of_model, words))
    found: NDArray[np.float64] = _finite(torch.cat(rows), head).numpy()
    return found


def _finite(found: torch.Tensor, head: Head) -> torch.Tensor:
    """Measures on the CPU; ModelError where they are no numbers."""
    found = found.to("cpu")
    if not found.isfinite().all():
        raise ModelError(
            f"logits of {type(head.decoder.model).__name__}, or of what it is compared with, "
            f"overflow or are NaN in {head.dtype}: load both as bfloat16 or float32 "
            f"(dtype, --dtype)"
        )
    return found


def measures(whole: torch.Tensor, model: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """(R, M) float64 measures of every token from (R, V) logits of both, a few rows at a time."""
    size = max(1, (_ON_CARDS if whole.is_cuda else LOGITS_PER_CHUNK) // whole.shape[1])
    words = words.to(whole.device)
    pieces = zip(whole.split(size), model.split(size), words.split(size), strict=True)
    return torch.cat([_of_rows(*piece) for piece in pieces])


def _of_rows(whole: torch.Tensor, model: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    log_p, log_q = whole.double().log_softmax(-1), model.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    agreement = (whole.argmax(-1) == model.argmax(-1)).double()
    acceptance = 1 - (p - q).abs().sum(-1) / 2
    divergence = (p * (log_p - log_q)).masked_fill(p == 0, 0).sum(-1)
    loss = -log_q.gather(1, words[:, None])[:, 0]
    return torch.stack([agreement, acceptance, divergence, loss], dim=1)


def _departure(agreement: NDArray[np.float64]) -> int:
    """The tokens before the first at which two models do not agree, or all of them."""
    apart = np.flatnonzero(agreement == 0)
    return int(apart[0]) if len(apart) else len(agreement)


def _of_own(own: Sequence[Answer]) -> dict[str, Scores]:
    """The repetition and the length of what was said, by prompt."""
    grams = [repeated(one.written) for one in own]
    found = Scores(*(np.array(one, np.float64) for one in zip(*grams, strict=True)))
    return {"repetition": found, "length": _each([len(one.written) for one in own])}


def _each(values: Iterable[float]) -> Scores:
    """Values by prompt, which count alike."""
    sums = np.array([*values], np.float64)
    return Scores(sums, np.ones_like(sums))
