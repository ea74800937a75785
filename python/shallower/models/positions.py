"""How long a text can be for a model that has learned its positions one by one."""

from torch import nn

from ..errors import TextsError
from .architecture import find_layers, text_config


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model has learned; None if it computes them, as by RoPE."""
    config = text_config(model)
    count = getattr(config, "max_position_embeddings", None)
    tables = [m for m in find_layers(model).runner.modules() if isinstance(m, nn.Embedding)]
    sizes = {table.num_embeddings for table in tables} - {config.vocab_size}
    # OPT and its kin keep two rows more, for padding.
    learned = isinstance(count, int) and any(0 <= size - count <= 2 for size in sizes)
    return count if learned else None


def check_length(num_tokens: int, positions: int | None) -> None:
    """Refuse a text that is longer than the positions of a model.

    Raises:
        TextsError: it is.
    """
    if positions is not None and num_tokens > positions:
        raise TextsError(
            f"a text has {num_tokens} tokens, and the model has learned {positions} positions: "
            f"choose a max_length (--max-length) of {positions} at most"
        )
