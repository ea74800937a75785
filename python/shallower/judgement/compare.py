"""The held-out losses of cuts, side by side."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.memory import without_layers
from ..errors import LayersError
from ..evaluation.loss import evaluate_loss
from ..models.architecture import find_layers
from ..scanning.scan import Scan
from ..values.layers import Block, check_sizes, deepest_block
from ..values.loss import Comparison, Cut, Loss


def compare_cuts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scanned: Scan,
    texts: Iterable[str],
    sizes: Sequence[int],
    max_length: int = 256,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Comparison:
    """Measure the loss of the best block and of the deepest one, for every size.

    ``texts`` should be held out; they are read once. The model is as before afterwards.

    Raises:
        LayersError: a size that the model cannot lose, or a scan of another number of layers.
        TextsError: as :func:`evaluate_loss`.
    """
    num_layers = len(find_layers(model))
    if scanned.num_layers != num_layers:
        raise LayersError(f"the scan is of {scanned.num_layers} layers, the model has {num_layers}")
    check_sizes(sizes, scanned.num_layers)
    texts = list(texts)
    options: dict[str, Any] = {
        "max_length": max_length,
        "batch_size": batch_size,
        "progress": progress,
    }
    base = evaluate_loss(model, tokenizer, texts, description="loss, all layers", **options)
    losses: dict[Block, Loss] = {}
    cuts = []
    for n in sizes:
        best, deepest = (
            scanned.best_block(n),
            scanned.scored(deepest_block(num_layers, n)),
        )
        for strategy, block in (("similarity", best), ("deepest", deepest)):
            if block not in losses:
                with without_layers(model, [block]):
                    losses[block] = evaluate_loss(
                        model, tokenizer, texts, description=f"loss without {block}", **options
                    )
            cuts.append(Cut(strategy, block, losses[block]))
    return Comparison(base, tuple(cuts))
