"""The recomputation of activations in the backward pass, which saves their memory."""

from typing import Any

from transformers import PreTrainedModel

_RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
RECOMPUTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"
"""What transformers calls it; it was renamed with 5.23."""


def recompute_activations(model: Any, on: bool) -> None:
    """Have activations recomputed in the backward pass, or kept."""
    if on:
        getattr(model, "_".join((RECOMPUTING, "enable")))({"use_reentrant": False})
    else:
        getattr(model, "_".join((RECOMPUTING, "disable")))()
