"""The held-out losses of cuts, side by side."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.in_model import without_layers
from ..errors import LayersError
from ..evaluation.loss import fitting_tokens, measure_loss
from ..models.decoder import Decoder
from ..scanning.scan import Scan
from ..values.layers import Block, check_sizes, deepest_block
from ..values.loss import Comparison, Cut, Loss
from ..values.tokens import BatchSize, Tokens


def compare_cuts(
    model: PreTrainedModel | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    scanned: Scan,
    *,
    texts: Iterable[str],
    sizes: Sequence[int],
    max_length: int = 256,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
) -> Comparison:
    """Measure the loss of the best block and of the deepest one, for every size.

    All losses are on the same tokens, so that they can be compared text by text. A block that is
    both the best and the deepest, or is named twice, is measured once.

    Args:
        model: the model that was scanned; it is as before afterwards.
        tokenizer: its tokenizer.
        scanned: a scan of the model.
        texts: held-out texts, any iterable of strings, read once.
        sizes: block sizes to measure.
        max_length: tokens of a text at most.
        batch_size: texts in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        progress: bars with ETA on standard error; by default if that is a terminal.

    Returns:
        The loss of the whole model, and for every size that of the best block (strategy
        ``similarity``) and of the deepest one (``deepest``), each with its paired difference to
        the whole; and the sizes at which the two are tied.

    Raises:
        LayersError: a size that the model cannot lose, or a scan of another number of layers.
        TextsError: no text has two tokens, or a text is not a string.
        ModelError: a loss is not finite.

    Example:
        >>> comparison = sh.compare_cuts(model, tokenizer, scan, texts=held_out, sizes=[1, 4])
        >>> [str(cut.block) for cut in comparison.cuts if cut.strategy == "deepest"]
        ['[28, 29)', '[25, 29)']
        >>> all(cut.loss.nats > 0 for cut in comparison.cuts)
        True
    """
    decoder = Decoder.of(model)
    if scanned.num_layers != len(decoder):
        raise LayersError(
            f"the scan is of {scanned.num_layers} layers, and the model has {len(decoder)}: scan "
            f"this model"
        )
    check_sizes(sizes, len(decoder))
    texts = list(texts)
    tokens = fitting_tokens(decoder, Tokens(max_length, batch_size))

    def measure(description: str) -> Loss:
        return measure_loss(
            decoder, tokenizer, texts, tokens=tokens, progress=progress, description=description
        )

    base = measure("loss, all layers")
    losses: dict[Block, Loss] = {}
    cuts = []
    for n in sizes:
        deepest = scanned.scored(deepest_block(len(decoder), n))
        for strategy, block in (("similarity", scanned.best_block(n)), ("deepest", deepest)):
            if block not in losses:
                with without_layers(decoder.model, [block]):
                    losses[block] = measure(f"loss without {block}")
            cuts.append(Cut(strategy, block, losses[block]))
    return Comparison.of(base, cuts)
