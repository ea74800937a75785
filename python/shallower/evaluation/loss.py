"""The next-token loss of a model on texts."""

import math
from collections.abc import Iterable, Sized

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError, TextsError
from ..models.architecture import evaluating, find_layers, input_device
from ..models.positions import check_length, learned_positions
from ..progress import track
from ..texts.batches import Batch, TokenBatches
from ..values.loss import Loss
from ..values.plan import describe_rejections

IN_CACHE = 1 << 20
"""Logits that a processor's softmax is taken of at once, a few megabytes: five times as fast
as those of a text."""


def evaluate_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int = 256,
    batch_size: int = 8,
    progress: bool | None = None,
    description: str = "loss",
) -> Loss:
    """The mean cross-entropy of the next token, in nats.

    Every text is tokenised as the tokenizer does by default and truncated to
    ``max_length``; its first token is given, all others are predicted. The mean is over
    tokens; its standard error is that of a ratio of sums over texts (tokens of one text are
    not independent): ``sqrt(S/(S-1) · sum_i (loss_i - nats·n_i)²) / sum_i n_i``.

    Raises:
        TextsError: no text has two tokens, or a text is no string, or longer than the
            positions that the model has learned.
        ModelError: the loss is not finite.
    """
    batches = TokenBatches(tokenizer, texts, max_length, batch_size, min_tokens=2)
    device = input_device(find_layers(model))
    positions = learned_positions(model)
    losses: list[float] = []
    counts: list[int] = []
    vocab_size = 0
    total = len(texts) if isinstance(texts, Sized) else None
    with track(description, total, progress) as advance, evaluating(model):
        for batch in batches:
            check_length(batch.input_ids.shape[1], positions)
            sums, vocab_size = _summed_losses(model, batch, device)
            losses += sums
            counts += [int(n) - 1 for n in batch.attention_mask.sum(axis=1)]
            advance(len(batch))
    if not losses:
        raise _nothing_to_predict(batches)
    num_tokens = sum(counts)
    nats = math.fsum(losses) / num_tokens
    deviations = math.fsum((s - nats * n) ** 2 for s, n in zip(losses, counts, strict=True))
    size = len(losses)
    stderr = math.sqrt(deviations * size / (size - 1)) / num_tokens if size > 1 else math.nan
    return Loss(nats, stderr, num_tokens, size, batches.num_rejected, vocab_size)


def next_token_losses(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of every token, (T,) float32 nats.

    Args:
        logits: (T, V), of any float dtype.
        expected: (T,) token ids.
    """
    rows = len(logits) if logits.is_cuda else max(1, IN_CACHE // logits.shape[1])
    parts = zip(logits.split(rows), expected.split(rows), strict=True)
    losses = [functional.cross_entropy(z.float(), e, reduction="none") for z, e in parts]
    return torch.cat(losses)


def losses_of_texts(logits: torch.Tensor, batch: Batch) -> list[float]:
    """The summed cross-entropy of every text of a batch, from its logits (B, T, V)."""
    sums = []
    for row, length in enumerate(batch.attention_mask.sum(axis=1).tolist()):
        expected = torch.from_numpy(batch.input_ids[row, 1:length]).to(logits.device)
        losses = next_token_losses(logits[row, : length - 1], expected)
        sums.append(float(losses.double().sum()))
    return sums


def require_predictable(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_length: int
) -> None:
    """Refuse texts that :func:`evaluate_loss` would refuse, before any long work.

    Raises:
        TextsError: no text has two tokens.
    """
    batches = TokenBatches(tokenizer, texts, max_length, 1, min_tokens=2)
    if not any(True for _ in batches):
        raise _nothing_to_predict(batches)


def _nothing_to_predict(batches: TokenBatches) -> TextsError:
    if not batches.num_texts:
        return TextsError("there are no texts to predict")
    return TextsError(
        "no text has two tokens, so nothing can be predicted: "
        + describe_rejections(batches.num_rejected, batches.num_texts, batches.rejections)
    )


@torch.inference_mode()
def _summed_losses(
    model: PreTrainedModel, batch: Batch, device: torch.device
) -> tuple[list[float], int]:
    """The summed loss of every text of a batch, and the size of the vocabulary."""
    input_ids = torch.from_numpy(batch.input_ids).to(device)
    attention_mask = torch.from_numpy(batch.attention_mask).to(device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    sums = losses_of_texts(logits, batch)
    for sample, loss in zip(batch.samples, sums, strict=True):
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss on text {sample} is not finite: the model's logits overflow "
                f"or are NaN in {logits.dtype}; load it as bfloat16 or float32"
            )
    return sums, logits.shape[-1]
