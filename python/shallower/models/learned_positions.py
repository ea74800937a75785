"""Longest texts of models that have learned their positions one by one."""

from typing import Any

from torch import nn

from ..errors import TextsError


def learned_positions(runner: nn.Module, config: Any) -> int | None:
    """Find how many positions a model has learned.

    Args:
        runner: the model without its head.
        config: the part of its config that describes its decoder.

    Returns:
        Their number; None if the model computes them, as by RoPE.
    """
    count = getattr(config, "max_position_embeddings", None)
    tables = [module for module in runner.modules() if isinstance(module, nn.Embedding)]
    sizes = {table.num_embeddings for table in tables} - {config.vocab_size}
    # OPT and its kin keep two rows more, for padding.
    learned = isinstance(count, int) and any(0 <= size - count <= 2 for size in sizes)
    return count if learned else None


def check_length(num_tokens: int, positions: int | None) -> None:
    """Refuse a text that is longer than the positions of a model.

    Args:
        num_tokens: of the text.
        positions: that the model has learned; None if it computes them.

    Raises:
        TextsError: the text is longer.
    """
    if positions is not None and num_tokens > positions:
        raise TextsError(
            f"a text has {num_tokens} tokens, and the model has learned {positions} positions: "
            f"choose a max_length (--max-length) of {positions} at most"
        )
