"""The next-token loss of a model on texts, by one process or several; perplexity of one text."""

import math
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError
from ..memory.plan import Forward, fitting
from ..memory.retry import Halving
from ..memory.streaming import Forwards, text_steps
from ..models.architecture import evaluating
from ..models.decoder import Decoder
from ..models.head import LOGITS_AT_ONCE, Head
from ..progress import track
from ..results.loss import Loss, TextLoss
from ..results.perplexity import Perplexity
from ..results.scores import Scores
from ..texts.batches import Batch, TokenBatches
from ..texts.sources import own_texts
from ..values.entries import ResultStore, recall
from ..values.plan import Plan, gone_by
from ..values.schema import of_type
from ..values.tokens import BatchSize, Tokens
from .batches import (
    AllBatches,
    batches_of_texts,
    batches_of_windows,
    cut_of,
    look_of,
    loss_journal,
    nothing_to_predict,
    recorded,
    sums_of,
)

Share = TypeVar("Share")

LOGITS_PER_CHUNK = 1 << 20
"""Logits whose softmax a CPU takes at once: a few megabytes, which its cache holds. Five times as
fast as all logits of a text."""


def evaluate_loss(
    model: PreTrainedModel | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_length: int = 256,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    description: str = "loss",
) -> Loss:
    """Measure the mean cross-entropy of the next token.

    Every text is tokenised as the tokenizer does by default and truncated to ``max_length``; its
    first token is given, all others are predicted. The mean is over tokens. Tokens of one text are
    not independent: the standard error is that of a ratio of sums over texts.

    ``sqrt(S/(S-1) · sum_i (loss_i - nats·n_i)²) / sum_i n_i``

    Args:
        model: a causal language model of transformers, quantised or not, on any device.
        tokenizer: its tokenizer.
        texts: any iterable of strings, read once. Texts of fewer than two tokens are left out
            and counted.
        max_length: tokens of a text at most.
        batch_size: texts in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        progress: a bar with ETA on standard error; by default if that is a terminal.
        description: the name of the bar.

    Returns:
        The loss in nats a token with its standard error, and what it was measured on.

    Raises:
        TextsError: no text has two tokens, or a text is not a string, or longer than the
            positions that the model has learned.
        ModelError: the loss is not finite.

    Example:
        >>> import shallower as sh
        >>> from shallower.studies.demo import model_path
        >>> model, tokenizer = sh.load_model(model_path(), dtype="float32")
        >>> loss = sh.evaluate_loss(model, tokenizer, ["The cat sat on the mat."])
        >>> print(loss.nats, "nats a token, on", loss.num_texts, "text")
        5.3... nats a token, on 1 text
    """
    return measure_loss(
        Decoder.of(model),
        tokenizer,
        texts,
        tokens=Tokens(max_length, batch_size),
        progress=progress,
        description=description,
    )


def measure_loss(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    tokens: Tokens,
    plan: Plan | None = None,
    store: ResultStore | None = None,
    progress: bool | None = None,
    description: str = "loss",
    shared: bool = False,
) -> Loss:
    """Measure the loss as :func:`evaluate_loss` does, of a model that is known already.

    It is without what ``plan`` drops. Batches that ``store`` has of the whole model are not run
    again. ``shared``: the processes of torch.distributed's group, if there is one, share the
    batches. All of them must call this with the same model and texts, and get the same loss or
    error.
    """
    every = batches_of_texts(tokenizer, texts, fitting_tokens(decoder, tokens))
    rank, size = rank_and_size(shared)

    def measure() -> tuple[NDArray[np.float64], int]:
        mine = range(len(every.batches))[rank::size]
        how: Any = {"looks": mine, "store": store, "name": description, "progress": progress}
        scores, vocab_size = scores_of(decoder, every, plan, **how)
        return scores.sums, vocab_size

    (sums, vocab_size), *others = gathered(measure, size)
    for more, _ in others:
        sums = np.where(np.isnan(sums), more, sums)
    every.warn_of_rejected()
    return every.loss(Scores(sums, every.weights), vocab_size)


def scores_of(
    decoder: Decoder,
    every: AllBatches,
    plan: Plan | None = None,
    *,
    looks: range | None = None,
    store: ResultStore | None = None,
    name: str = "loss",
    progress: bool | None = None,
) -> tuple[Scores, int]:
    """Measure the batches that the store lacks, of a model that is without what a plan drops.

    All of them, or ``looks`` alone. Returns the scores and the size of the vocabulary. Raises
    CacheError, and as :func:`shallower.evaluate_loss`.
    """
    gone, known, sizes = gone_by(plan or ()), dict[int, NDArray[np.float64]](), [0]
    num_layers = len(decoder) if plan is None else plan.num_layers
    journal = None if store is None else loss_journal(store, every)
    started = time.perf_counter()

    def take(record: dict[str, Any]) -> None:
        if cut_of(record, num_layers) == gone:
            look = look_of(record, len(every.batches))
            known[look] = sums_of(record, len(every.batches[look]))
            sizes.append(of_type(int, record["vocab_size"]))

    def keep(look: int, sums: NDArray[np.float64], size: int) -> None:
        nonlocal started
        took, started = time.perf_counter() - started, time.perf_counter()
        if journal is not None:
            journal.append(recorded(gone, look, sums=sums, seconds=took, vocab_size=size))

    recall(journal, take, "trials")
    how: Any = {"known": known, "keep": keep, "description": name, "progress": progress}
    sums, size = nats_of(decoder, every.numbered, looks, **how)
    return Scores(sums, every.weights), size or max(sizes)


def nats_of(
    decoder: Decoder,
    batches: Sequence[Batch],
    which: Sequence[int] | None = None,
    *,
    known: Mapping[int, NDArray[np.float64]] = MappingProxyType({}),
    keep: Callable[[int, NDArray[np.float64], int], object] = lambda *_: None,
    description: str,
    progress: bool | None = None,
) -> tuple[NDArray[np.float64], int]:
    """Measure batches of numbered texts, all or some of them, but those that are known.

    ``keep`` receives the number of a batch, the nats of its texts and the size of the vocabulary.
    Returns (S,) float64 nats by text, NaN of what is not measured, and that size, 0 where all was
    known. Raises as :func:`text_losses`.
    """
    wanted = range(len(batches)) if which is None else which
    found = {place: known[place] for place in wanted if place in known}
    missing = [place for place in wanted if place not in found]
    steps, size = text_steps(decoder), 0
    total = steps * sum(len(batches[place]) for place in wanted)
    with track(description, total, progress) as advance, evaluating(decoder.model):
        advance(steps * sum(map(len, found.values())))
        if missing or not found:
            forwards = Forwards(decoder)
            size = forwards.head.vocab_size
            each = _losses_of(forwards, (batches[place] for place in missing), advance)
            for place, some in zip(missing, each, strict=True):
                found[place] = np.array([nats for _, nats, _ in some])
                keep(place, found[place], size)
    sums = np.full(sum(map(len, batches)), np.nan)
    for place, nats in found.items():
        sums[batches[place].samples] = nats
    return sums, size


def _losses_of(
    forwards: Forwards, batches: Iterable[Batch], advance: Callable[[int], object]
) -> Iterator[list[TextLoss]]:
    """Yield the losses of the texts of each batch, by a model that is evaluating meanwhile."""
    halving, sizes, found = Halving(), deque[int](), list[TextLoss]()

    def parts() -> Iterator[list[Batch]]:
        for batch in batches:
            sizes.append(len(batch))
            yield _parts(forwards.head, batch)

    for part in forwards.ready(parts(), advance):
        found += text_losses(forwards.head, part, halving)
        if len(found) == sizes[0]:
            yield found
            sizes.popleft()
            found = []


def _parts(head: Head, batch: Batch) -> list[Batch]:
    """The batch; in parts, if the model makes all logits of it at once and they are many."""
    head.decoder.check_length(batch.input_ids.shape[1])
    if head.by_rows:
        return [batch]
    return batch.split(max(1, LOGITS_AT_ONCE // (batch.input_ids.shape[1] * head.vocab_size)))


def text_losses(head: Head, batch: Batch, halving: Halving) -> Iterator[TextLoss]:
    """Yield the loss of every text.

    Raises ModelError where a loss is not finite, or there is no memory for a single text.
    """
    for piece, sums in halving.run(batch, lambda some: summed_losses(head, some).tolist()):
        _require_finite(sums, piece, head)
        counts = (piece.attention_mask.sum(axis=1) - 1).tolist()
        yield from zip(piece.samples.tolist(), sums, counts, strict=True)


def fitting_tokens(decoder: Decoder, tokens: Tokens) -> Tokens:
    """Decide how many texts make one forward of an evaluation, where that is ``auto``."""
    return fitting(decoder, tokens, FORWARD)


@torch.inference_mode()
def _rehearsed(decoder: Decoder, batch: Batch) -> None:
    """Run :func:`summed_losses` up to its first logits alone: the others take their place."""
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    for _logits in Head.of(decoder).logits_of(ids, mask, np.flatnonzero(batch.attention_mask)):
        return


def _on_cards(decoder: Decoder, tokens: int) -> int:
    """A GPU takes the softmax of all logits that are made at once: two copies in float32."""
    return 8 * min(tokens * int(getattr(decoder.config, "vocab_size", 0)), LOGITS_AT_ONCE)


FORWARD = Forward(_rehearsed, on_cards=_on_cards)
"""The forward of an evaluation, as its memory is rehearsed."""


def next_token_losses(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """(T,) float32 nats: the cross-entropy of (T, V) logits at (T,) token ids, int64."""
    rows = len(logits) if logits.is_cuda else max(1, LOGITS_PER_CHUNK // logits.shape[1])
    # Written into one tensor: small ones, allocated among large ones, keep the heap in pieces.
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    pieces = logits.split(rows), expected.split(rows), losses.split(rows)
    for some, tokens, found in zip(*pieces, strict=True):
        found.copy_(functional.cross_entropy(some.float(), tokens, reduction="none"))
    return losses


def predicting_tokens(batch: Batch) -> NDArray[np.bool_]:
    """(B, T), true at the tokens whose logits predict a token of the text that is not given."""
    last = batch.attention_mask.sum(axis=1, keepdims=True) - 1
    found: NDArray[np.bool_] = batch.learned & (np.arange(batch.input_ids.shape[1]) < last)
    return found


def logits_at(head: Head, batch: Batch, tokens: NDArray[np.bool_]) -> Iterator[torch.Tensor]:
    """Yield (R, V) logits of the next R of the tokens (B, T) of a batch, text by text."""
    device = head.decoder.device
    input_ids = torch.from_numpy(batch.input_ids).to(device)
    attention_mask = torch.from_numpy(batch.attention_mask).to(device)
    yield from head.logits_of(input_ids, attention_mask, np.flatnonzero(tokens))


@torch.inference_mode()
def summed_losses(head: Head, batch: Batch) -> torch.Tensor:
    """(B,) float64 nats of every text over all tokens but those given.

    Nothing is read back from the device.
    """
    predicting = predicting_tokens(batch)
    expected = torch.from_numpy(np.roll(batch.input_ids, -1, axis=1)[predicting])
    parts: list[torch.Tensor] = []
    start = 0
    for logits in logits_at(head, batch, predicting):
        stop = start + len(logits)
        parts.append(next_token_losses(logits, expected[start:stop].to(logits.device)))
        start = stop
        del logits  # before the next are made
    losses = torch.cat(parts).split(predicting.sum(axis=1).tolist())
    return torch.stack([of_text.double().sum() for of_text in losses])


def out_of_domain_texts(tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Read our own texts of 32 kinds; none where the tokenizer has no two tokens of any."""
    batches = TokenBatches(tokenizer, own_texts(), Tokens(max_length, 1), min_tokens=2)
    return own_texts() if any(True for _ in batches) else []


def require_predictable(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_length: int
) -> None:
    """Refuse texts of which none has two tokens, before any long work, by TextsError."""
    batches = TokenBatches(tokenizer, texts, Tokens(max_length, 1), min_tokens=2)
    if not any(True for _ in batches):
        raise nothing_to_predict(batches)


def _require_finite(sums: list[float], batch: Batch, head: Head) -> None:
    for sample, loss in zip(batch.samples, sums, strict=True):
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss on text {sample} is not finite: the model's logits overflow "
                f"or are NaN in {head.dtype}; load it as bfloat16 or float32"
            )


def rank_and_size(shared: bool) -> tuple[int, int]:
    """The rank and number of processes that share a measurement; 0 and 1 if alone.

    All must agree on ``shared``.
    """
    if shared and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(measure: Callable[[], Share], size: int) -> list[Share]:
    """Measure this process's share, which must be picklable, and gather all shares by rank.

    What is raised in one process is raised in all, so that none waits for one that failed.
    """
    if size == 1:
        return [measure()]
    share, error = None, None
    try:
        share = measure()
    except Exception as raised:
        error = raised
    shares: list[Any] = [None] * size
    distributed.all_gather_object(shares, (share, _picklable(error)))
    if error is not None:
        raise error
    for _, other in shares:
        if other is not None:
            raise other
    return [share for share, _ in shares]


def _picklable(error: Exception | None) -> Exception | None:
    """The error; one of the same content where another process could not unpickle it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        name = type(error).__name__
        return ModelError(f"another process could not measure its share: {name}: {error}")
    return error


def evaluate_perplexity(
    model: PreTrainedModel | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 2048,
    bos: bool = False,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    description: str = "perplexity",
) -> Perplexity:
    """Measure the perplexity of a text as papers do that of WikiText-2.

    The whole text is tokenised as one, without special tokens, and cut into windows of ``context``
    tokens side by side; what fills no window at the end does not count. The first token of a window
    is given; all others are predicted, each from those before it in its window (as in GPTQ, arXiv
    2210.17323).

    Args:
        model: a causal language model of transformers, quantised or not, on any device.
        tokenizer: its tokenizer.
        text: the text, as long as one window at least.
        context: tokens of a window.
        bos: begin every window with the beginning-of-text token, in place of one token of text;
            then all tokens of the text are predicted.
        batch_size: windows in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        progress: a bar with ETA on standard error; by default if that is a terminal.
        description: the name of the bar.

    Returns:
        The perplexity, its standard error over windows, and how it was measured.

    Raises:
        TextsError: the text is shorter than a window; a window is longer than the positions that
            the model has learned; there is no beginning-of-text token.
        ModelError: the loss is not finite.
    """
    decoder = Decoder.of(model)
    fitted = fitting_tokens(decoder, Tokens(context, batch_size))
    windows = batches_of_windows(tokenizer, text, fitted, bos=bos)
    sums, _ = nats_of(decoder, windows.numbered, description=description, progress=progress)
    return windows.perplexity(Scores(sums, windows.weights))
