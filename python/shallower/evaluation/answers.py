"""Answers: what a model says to prompts, greedily or drawn, whatever else runs beside it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import ModelError, TextsError
from ..memory.retry import Halving
from ..memory.streaming import Forwards
from ..models.architecture import evaluating, swapped
from ..models.decoder import Decoder
from ..progress import Advance, part, track
from ..results.speech import Answer
from ..texts.batches import Batch, padded
from ..texts.prompts import (
    Prompt,
    ends_of_answers,
    given_prompts,
    has_template,
    prompt_ids,
    training_prompts,
)
from ..texts.quiet import hushed
from ..values.counts import counted
from ..values.tokens import BatchSize, Tokens
from .loss import fitting_tokens, logits_at

AT_ONCE = 32
"""Prompts that are answered at once: the weights are read once a token for all of them."""


def answer_prompts(
    model: PreTrainedModel | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Path | Iterable[str | Mapping[str, Any] | Prompt] | None = None,
    *,
    num_prompts: int = 1024,
    num_tokens: int = 256,
    seed: int | None = 0,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
) -> list[Answer]:
    """Let a model answer prompts, so that its cut can be patched and trained on what it says.

    Every answer is drawn by the model's probabilities as they are, with no temperature, cut-off or
    penalty, whatever its settings prefer; it depends on the seed and on the tokens of its prompt.
    It ends where the model ends a text or an answer.

    Args:
        model: a causal language model of transformers, before the cut.
        tokenizer: its tokenizer.
        prompts: a file of JSON lines with ``prompt`` or ``messages``, or an iterable of texts, of
            such objects or of both; by default prompts of our own, for models that chat.
        num_prompts: how many of our own.
        num_tokens: tokens of an answer at most.
        seed: of what is drawn, and of which prompts of our own; None for the likeliest tokens.
        batch_size: prompts at once; by default 32.
        progress: a bar with ETA on standard error; by default if that is a terminal.

    Returns:
        An answer to every prompt, in their order, for ``answers`` of :func:`shallower.patch` and
        :func:`shallower.heal`.

    Raises:
        TextsError: there are no prompts, or what is none; more of our own than there are; a chat,
            or no prompts, without a template for chats; a prompt that leaves no room for an answer.
        ModelError: the model cannot generate text, or its layers are streamed from disk.

    Example:
        >>> begun = [text[:40] for text in texts]  # of a model that does not chat
        >>> answers = sh.answer_prompts(model, tokenizer, begun[:32], num_tokens=16)
        >>> len(answers), max(len(one.written) for one in answers) <= 16
        (32, True)
        >>> done = sh.patch(model, tokenizer, [range(12, 20)], texts=texts, answers=answers)
        >>> done.share
        0.5
    """
    decoder = Decoder.of(model)
    check_at_hand(decoder)
    _ = Tokens(batch_size=batch_size)
    if prompts is None and not has_template(tokenizer):
        raise TextsError(
            "the tokenizer has no chat template, and prompts of our own are chats: give the "
            "beginnings of some texts (prompts)"
        )
    given = given_prompts(prompts) if prompts is not None else None
    return write_answers(
        decoder,
        tokenizer,
        prompt_ids(tokenizer, given or training_prompts(num_prompts, seed or 0)),
        num_tokens=num_tokens,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )


def write_answers(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int64]],
    *,
    num_tokens: int,
    seed: int | None = None,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    description: str = "answers",
) -> list[Answer]:
    """Let a model go on from prompts, (P,) int64 token ids each, as far as it wants to.

    The likeliest token is taken each time, or, with a ``seed``, one drawn by the probabilities as
    they are. What is drawn depends on the seed and on the tokens of the prompt, and not on the
    prompts beside it. Where layers are streamed, each token takes a pass over them, in which all
    answers go on. Raises ModelError where the model cannot generate text, or its layers cannot be
    run one by one, and TextsError as :func:`check_prompts`.
    """
    check_generates(decoder)
    check_prompts(decoder, prompts, num_tokens)
    ends, most = ends_of(decoder.model, tokenizer), len(prompts) * num_tokens
    if decoder.is_streamed:
        answers: list[Answer] = []
        tokens = Tokens(max(map(len, prompts)) + num_tokens, batch_size)
        bar = track(description, most, progress)
        with bar, part(most) as advance, evaluating(decoder.model):
            passes = _in_passes(decoder, prompts, {*ends}, tokens=tokens, seed=seed)
            for answers in islice(passes, num_tokens):  # noqa: B007 - the last are all
                advance(len(prompts))
        return answers
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    found: dict[int, Answer] = {}
    halving = Halving()
    with (
        track(description, most, progress),
        evaluating(decoder.model),
        # Settings of its own would change its probabilities.
        swapped(decoder.model, generation_config=GenerationConfig()),
    ):
        size = AT_ONCE if batch_size == "auto" else batch_size
        size = size if size == 1 or _answers_together(decoder, prompts) else 1
        for start in range(0, len(order), size):
            batch = padded([(index, prompts[index]) for index in order[start : start + size]])
            with part(len(batch) * num_tokens) as advance:
                for some, answers in halving.run(
                    batch, lambda some: _answered(decoder, some, ends, num_tokens, seed, advance)
                ):
                    found.update(zip(some.samples.tolist(), answers, strict=True))
    return [found[index] for index in range(len(prompts))]


def check_at_hand(decoder: Decoder) -> None:
    """Refuse, by ModelError, a model that cannot be let to speak, or would be read for it often."""
    if decoder.is_streamed:
        raise ModelError(
            "the layers are streamed from disk, and every token of every answer would read all of "
            "them: leave out --stream, or what the model is to say (speech, --speech)"
        )
    check_generates(decoder)


def check_generates(decoder: Decoder) -> None:
    """Refuse, by ModelError, a model that cannot generate text."""
    if not decoder.model.can_generate():
        raise ModelError(
            f"{type(decoder.model).__name__} cannot generate text: leave out what it is to say "
            f"(speech, --speech)"
        )


def check_prompts(decoder: Decoder, prompts: Sequence[NDArray[np.int64]], num_tokens: int) -> None:
    """Refuse prompts that have no token, or leave no room for an answer, by TextsError."""
    if not len(prompts):
        raise TextsError("there are no prompts to answer")
    if num_tokens < 1:
        raise TextsError(
            f"answers of at most {num_tokens} tokens: expected 1 at least (num_tokens, "
            f"--answer-tokens)"
        )
    for index, ids in enumerate(prompts):
        if not len(ids):
            raise TextsError(f"prompt {index} has no token: write a longer one")
    longest = max(map(len, prompts))
    place = next(index for index, ids in enumerate(prompts) if len(ids) == longest)
    decoder.check_length(
        longest + num_tokens,
        f"prompt {place} with an answer of {counted(num_tokens, 'token')}",
        "shorten it, or the answers (num_tokens, --answer-tokens)",
    )


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, ascending."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return sorted({one for one in several if isinstance(one, int)} | ends_of_answers(tokenizer))


def _answers_together(decoder: Decoder, prompts: Sequence[NDArray[np.int64]]) -> bool:
    """Whether a model says to the shortest prompt beside the longest what it says to it alone.

    Some families count positions from the padding on, or mix the states of texts.
    """
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    options = {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    try:
        alone = generated(decoder, [shortest], **options).logits
        beside = [one[:1] for one in generated(decoder, [shortest, longest], **options).logits]
    except RuntimeError:  # of memory, too
        return False
    most = 1e-3 if decoder.model.dtype == torch.float32 else 0.15
    steps = [_unlike(*logits) <= most for logits in zip(beside, alone, strict=True)]
    same = torch.equal(beside[0].argmax(-1), alone[0].argmax(-1))  # else the rest is of others
    return all(steps if same else steps[:1])


def _unlike(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far logits are from others, by how far these are from their mean."""
    apart = (one - other).nan_to_num(0, 0, 0).double().square().mean().sqrt()
    spread = other.nan_to_num(0, 0, 0).double().std()
    return float(apart / spread.clamp(min=1e-12))


@torch.inference_mode()
def generated(decoder: Decoder, prompts: Sequence[NDArray[np.int64]], **options: Any) -> Any:
    """Run ``generate`` on prompts, which are padded on the left; by default greedily."""
    width = max(map(len, prompts))
    ids = np.zeros((len(prompts), width), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    generate: Any = decoder.model.generate
    with hushed():
        return generate(
            input_ids=torch.from_numpy(ids).to(decoder.device),
            attention_mask=torch.from_numpy(mask).to(decoder.device),
            pad_token_id=0,
            **{"do_sample": False, **options},
        )


def _answered(
    decoder: Decoder,
    batch: Batch,
    ends: list[int],
    num_tokens: int,
    seed: int | None,
    advance: Advance,
) -> list[Answer]:
    """Answer the prompts of a batch; ``advance`` receives the tokens as they are generated."""

    def count(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        advance(len(scores))
        return scores

    lengths = batch.attention_mask.sum(axis=1)
    prompts = [row[:length] for row, length in zip(batch.input_ids, lengths, strict=True)]
    processors: list[Any] = [count] if seed is None else [count, _sampling(prompts, seed)]
    output = generated(
        decoder,
        prompts,
        logits_processor=LogitsProcessorList(processors),
        max_new_tokens=num_tokens,
        eos_token_id=ends or None,
    )
    width = int(lengths.max())
    return [
        _up_to_end(prompt, row, {*ends})
        for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True)
    ]


def _up_to_end(prompt: NDArray[np.int64], row: list[int], ends: set[int]) -> Answer:
    """An answer with the token that ends it; behind that a batch may have anything."""
    stop = next((place for place, token in enumerate(row) if token in ends), None)
    written = row if stop is None else row[: stop + 1]
    return Answer(tuple(prompt.tolist()), tuple(written), stop is not None)


def _in_passes(
    decoder: Decoder,
    prompts: Sequence[NDArray[np.int64]],
    ends: set[int],
    *,
    tokens: Tokens,
    seed: int | None,
) -> Iterator[list[Answer]]:
    """Answer prompts by passes over layers on disk; give what there is of all after each token."""
    forwards, rows = Forwards(decoder), [one.tolist() for one in prompts]
    drawing = [None if seed is None else _sampling([one], seed) for one in prompts]
    size, going = fitting_tokens(decoder, tokens).texts, {*range(len(rows))}
    while going:
        for index, logits in _next_logits(forwards, {one: rows[one] for one in going}, size):
            drawn = drawing[index]
            token = int((logits if drawn is None else drawn(None, logits)).argmax())
            rows[index].append(token)
            going -= {index} if token in ends else set()
        pairs = zip(prompts, rows, strict=True)
        yield [_up_to_end(prompt, row[len(prompt) :], ends) for prompt, row in pairs]


@torch.inference_mode()
def _next_logits(
    forwards: Forwards, rows: Mapping[int, list[int]], size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run rows of token ids in one pass; give (1, V) float32 logits of what comes behind each."""
    order = sorted(rows, key=lambda index: (-len(rows[index]), index))
    ids = [(index, np.array(rows[index], np.int64)) for index in order]
    batches = ([padded(ids[start : start + size])] for start in range(0, len(ids), size))
    for batch in forwards.ready(batches):
        lengths = batch.attention_mask.sum(axis=1, keepdims=True)
        last = np.arange(batch.input_ids.shape[1]) == lengths - 1
        logits = torch.cat([*logits_at(forwards.head, batch, last)])
        yield from zip(batch.samples.tolist(), logits.float().split(1), strict=True)


def _sampling(
    prompts: Sequence[NDArray[np.int64]], seed: int
) -> Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]:
    """Give what leaves of every row the token alone that its own random numbers draw.

    The inverse of the cumulative distribution in float64, in the order of the token ids.
    """
    random = [np.random.default_rng(_stream(prompt, seed)) for prompt in prompts]

    def leave_drawn(_input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        drawn = torch.tensor([one.random() for one in random], dtype=torch.float64)
        sums = scores.double().softmax(-1).cumsum(-1)
        places = torch.searchsorted(sums, drawn.to(sums.device)[:, None] * sums[:, -1:], right=True)
        chosen = places.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)

    return leave_drawn


def _stream(prompt: NDArray[np.int64], seed: int) -> list[int]:
    """The seed of a prompt's own random numbers."""
    digest = hashlib.sha256(prompt.astype("<i8").tobytes()).digest()
    return [seed, *np.frombuffer(digest[:16], "<u4").tolist()]
