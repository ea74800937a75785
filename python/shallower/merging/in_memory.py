"""Whole models in memory: logits with adapters and merged, and a merge without safetensors.

For weights that are not stored one by one as safetensors, peft merges the whole model in float32.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.saving import PROBE
from ..errors import ModelError, why
from ..models.architecture import find_layers, input_device
from ..models.identity import identify
from ..models.source import ModelSource
from ..models.unsaved import warn_unsaved
from ..results.healing import Healing
from ..texts.quiet import hushed
from .low_rank import exact_products

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.005}
"""The most that ‖merged − adapters‖ / ‖adapters‖ of the logits may be, by the dtype of the sums."""


def require_same_model(
    model: PreTrainedModel, base: str, adapters: Path, *, healing: Healing
) -> None:
    """Raise ModelError for a model, named ``base``, that adapters were not trained for."""
    if identify(model).fingerprint != healing.model.fingerprint:
        raise another_model(base, adapters, healing)


def another_model(base: str, adapters: Path, healing: Healing) -> ModelError:
    """The error for a model, named ``base``, that adapters were not trained for."""
    return ModelError(
        f"the adapters in {adapters} were trained for {healing.model}, and {base} is "
        f"another model, or has other weights: name the one that they were trained for"
    )


def with_adapters(model: PreTrainedModel, adapters: Path, **options: Any) -> Any:
    """Load adapters around a cut as peft's model, for inference, by ``options`` of peft."""
    from peft import PeftModel

    with reading(adapters), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, of transformers
        return PeftModel.from_pretrained(model, str(adapters), **options).eval()


@contextmanager
def reading(adapters: Path) -> Iterator[None]:
    """Raise what adapters cannot be loaded for in the body as ModelError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot load the adapters in {adapters}: {why(error, adapters)}"
        ) from error


def adapted_logits(
    source: ModelSource, adapters: Path, *, healing: Healing, progress: bool | None = None
) -> torch.Tensor:
    """Load a cut with its adapters, and compute its (1, T, V) float32 logits on :data:`PROBE`."""
    model, tokenizer = source.load(progress)
    require_same_model(model, str(source), adapters, healing=healing)
    device = input_device(find_layers(model))
    return probe_logits(with_adapters(model, adapters), tokenizer, device)


@torch.inference_mode()
@exact_products()
def probe_logits(
    model: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> torch.Tensor:
    """Compute the (1, T, V) float32 logits of a model on :data:`PROBE`, on the CPU."""
    input_ids = tokenizer(PROBE, return_tensors="pt")["input_ids"].to(device)
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float().cpu()


def merge_in_memory(
    folder: Path,
    source: ModelSource,
    adapters: Path,
    *,
    healing: Healing,
    progress: bool | None = None,
) -> torch.Tensor:
    """Fold adapters into a whole model, float32 sums each rounded once, and save it.

    ``source`` is the cut in its stored dtype. Returns the logits of the adapters on it, (1, T, V)
    float32.
    """
    model, tokenizer = source.load(progress)
    require_same_model(model, str(source), adapters, healing=healing)
    warn_unsaved(model)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    config_dtype = copy.copy(model.config.dtype)
    device = input_device(find_layers(model))
    adapted = with_adapters(model.float(), adapters)
    expected = probe_logits(adapted, tokenizer, device)
    try:
        with exact_products():
            merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"cannot merge the adapters in {adapters}: {why(error)}") from error
    for name, value in merged.state_dict().items():
        owner, _, key = name.rpartition(".")
        if value.dtype != dtypes[name]:
            getattr(merged.get_submodule(owner), key).data = value.to(dtypes[name])
    merged.config.dtype = config_dtype
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(merged).pop(attribute, None)
    with hushed():
        merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return expected
