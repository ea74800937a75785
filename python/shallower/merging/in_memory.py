"""The check of a merged model by its logits, beside those of the adapters on their model."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.saving import PROBE
from ..errors import ModelError
from ..models.architecture import find_layers, input_device
from ..models.identity import identify
from ..models.source import ModelSource
from ..values.healing import Healing
from .low_rank import exact_products

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.005}
"""The most that ‖merged − adapters‖ / ‖adapters‖ of the logits may be, by the dtype that the sum of
weight and adapter is rounded to once."""


def require_same_model(
    model: PreTrainedModel, base: str, adapters: Path, *, healing: Healing
) -> None:
    """Refuse a model that adapters were not trained for.

    Args:
        model: the cut.
        base: its name.
        adapters: the folder of the adapters.
        healing: their record.

    Raises:
        ModelError: it is another one.
    """
    if identify(model).fingerprint != healing.model.fingerprint:
        raise another_model(base, adapters, healing)


def another_model(base: str, adapters: Path, healing: Healing) -> ModelError:
    """Make the error for a model that adapters were not trained for.

    Args:
        base: its name.
        adapters: the folder of the adapters.
        healing: their record.

    Returns:
        The error.
    """
    return ModelError(
        f"the adapters in {adapters} were trained for {healing.model}, and {base} is "
        f"another model, or has other weights: name the one that they were trained for"
    )


def with_adapters(model: PreTrainedModel, adapters: Path) -> Any:
    """Put adapters on a model, for inference.

    Args:
        model: the cut, in float32.
        adapters: their folder.

    Returns:
        peft's model.

    Raises:
        ModelError: they cannot be loaded.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, of transformers
            return PeftModel.from_pretrained(model, str(adapters)).eval()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"cannot load the adapters in {adapters}: {error}") from error


def adapted_logits(source: ModelSource, adapters: Path, *, healing: Healing) -> torch.Tensor:
    """Compute the logits of adapters on their model, and let go of it.

    Args:
        source: the cut.
        adapters: the folder of the adapters.
        healing: their record.

    Returns:
        (1, T, V) float32, on the CPU.

    Raises:
        ModelError: it is another model, or one of the two cannot be loaded.
    """
    model, tokenizer = source.load()
    require_same_model(model, str(source), adapters, healing=healing)
    device = input_device(find_layers(model))
    return probe_logits(with_adapters(model, adapters), tokenizer, device)


@torch.inference_mode()
@exact_products()
def probe_logits(
    model: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> torch.Tensor:
    """Compute the logits of a model on :data:`PROBE`.

    Args:
        model: of transformers, with adapters or without.
        tokenizer: its tokenizer.
        device: where token ids go.

    Returns:
        (1, T, V) float32, on the CPU.
    """
    input_ids = tokenizer(PROBE, return_tensors="pt")["input_ids"].to(device)
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float().cpu()
