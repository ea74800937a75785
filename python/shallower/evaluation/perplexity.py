"""The perplexity of one long text, in windows."""

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import TextsError
from ..memory.streaming import text_steps
from ..models.architecture import evaluating
from ..models.decoder import Decoder
from ..progress import track
from ..texts.batches import padded, untouched
from ..values.counts import counted
from ..values.perplexity import Perplexity
from ..values.scores import Scores
from ..values.tokens import BatchSize, Tokens
from .loss import TextLosses, fitting_tokens


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

    The whole text is tokenised as one, without special tokens, and cut into windows of
    ``context`` tokens side by side; what fills no window at the end does not count. The first
    token of a window is given, all others are predicted, each from those before it in its window
    (GPTQ, arXiv 2210.17323, and those who follow it).

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
        TextsError: the text is shorter than a window, a window is longer than the positions that
            the model has learned, or there is no beginning-of-text token.
        ModelError: the loss is not finite.
    """
    decoder = Decoder.of(model)
    windows, num_rest = windows_of(tokenizer, text, context, bos=bos)
    texts = int(fitting_tokens(decoder, Tokens(context, batch_size)).batch_size)
    losses = TextLosses(decoder)
    batches = (windows[start : start + texts] for start in range(0, len(windows), texts))
    sums = np.zeros(len(windows))
    bar = track(description, len(windows) * text_steps(decoder), progress)
    with bar as advance, evaluating(decoder.model):
        for found in losses.of(([padded(batch)] for batch in batches), advance):
            for window, nats, _ in found:
                sums[window] = nats
    return Perplexity(context, bos, num_rest, Scores(sums, np.full(len(sums), context - 1.0)))


def windows_of(
    tokenizer: PreTrainedTokenizerBase, text: str, context: int, *, bos: bool
) -> tuple[list[tuple[int, NDArray[np.int64]]], int]:
    """Every window's number and (context,) token ids; how many tokens are beyond them."""
    if context < 2:
        raise TextsError(f"a window must have at least 2 tokens, got {context} (--context)")
    first = []
    if bos:
        if tokenizer.bos_token_id is None:
            raise TextsError(
                "the tokenizer has no beginning-of-text token: measure without one (bos, --bos)"
            )
        first = [int(tokenizer.bos_token_id)]
    with untouched(tokenizer):
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
    ids = list(encoded["input_ids"])
    stride = context - len(first)
    if len(ids) < stride:
        raise TextsError(
            f"the text has {counted(len(ids), 'token')} and fills no window of {context}: take "
            f"shorter ones (context, --context) or a longer text"
        )
    starts = range(0, len(ids) - stride + 1, stride)
    windows = [np.array([*first, *ids[start : start + stride]], np.int64) for start in starts]
    return list(enumerate(windows)), len(ids) - stride * len(windows)
