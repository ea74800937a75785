"""The perplexity of one long text, in windows."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.decoder import Decoder
from ..values.perplexity import Perplexity
from ..values.scores import Scores
from ..values.tokens import BatchSize, Tokens
from .batches import batches_of_windows
from .loss import fitting_tokens, nats_of


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
