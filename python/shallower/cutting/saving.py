"""Cuts in memory saved as standard checkpoints, and the check of a saved one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError, OutputError, PlanError
from ..models.architecture import find_layers, input_device, require_weights, undo_rescaling
from ..models.identity import stored_dtype
from ..models.loading import load_model, load_weights
from ..models.quantised import check_exact, clear_gguf_marks
from ..storage import new_folder
from ..values.files import PLAN_FILE
from ..values.layers import Block
from ..values.loss import Loss
from ..values.plan import Plan
from .cards import CARD_FILE, exports, range_list
from .memory import without_layers


def logits_difference(
    model: PreTrainedModel, path: str | Path, layers: Sequence[Block], input_ids: torch.Tensor
) -> float:
    """How far the saved checkpoint is from the model with its layers skipped.

    Loads ``path``, a folder or a GGUF file, with stock transformers and gives the greatest
    absolute difference of the logits on ``input_ids`` (B, T). ``model`` is the uncut one;
    nothing is changed.

    Raises:
        ModelError: the checkpoint cannot be loaded, or lacks weights.
    """
    reloaded: Any
    if Path(path).suffix == ".gguf":
        dtype: Any = stored_dtype(model)
        reloaded, _ = load_model(path, dtype)
    else:
        reloaded = load_weights(str(path), model.dtype)
    device = input_device(find_layers(model))
    reloaded.to(device)
    with torch.inference_mode():
        with without_layers(model, layers):
            expected = model(input_ids=input_ids.to(device), use_cache=False).logits
        got = reloaded(input_ids=input_ids.to(device), use_cache=False).logits
    return float((got.float() - expected.float()).abs().max())


def verify_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    layers: Sequence[Block],
    text: str,
) -> float:
    """Check a saved cut by :func:`logits_difference` on one text; gives the difference.

    Raises:
        ModelError: it exceeds 1e-5 in float32, or 0.1 in the other dtypes.
    """
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :128]
    difference = logits_difference(model, path, layers, input_ids)
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.1
    if not difference <= tolerance:
        raise ModelError(
            f"the checkpoint {path} is not the model with its layers skipped: its logits are off "
            f"by {difference:.2g}, more than {tolerance:.0e}"
        )
    return difference


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    plan: Plan | None = None,
    overwrite: bool = False,
    losses: tuple[Loss, Loss] | None = None,
) -> None:
    """Save a standard checkpoint, whole or not at all, that stock transformers loads.

    With a plan, the plan itself, a model card and what mergekit and llama.cpp need for the
    same cut lie beside the weights (``exports.EXPORT_FILES``).

    Args:
        model: cut or not; a 4-bit model becomes a standard 4-bit checkpoint.
        tokenizer: saved beside it, unless ``None``.
        path: a folder that does not exist yet, or is empty.
        plan: what was dropped; saved as ``shallower_plan.json``.
        overwrite: replace what is at ``path``, once the new checkpoint is complete.
        losses: the held-out loss before and after the cut, for the model card.

    Raises:
        PlanError: ``plan`` leaves another number of layers than the model has.
        OutputError: ``path`` holds something already, or cannot be written to.
        ModelError: weights that cannot be saved as they are.
    """
    check_exact(model)
    require_weights(model)
    texts = {} if plan is None else _exports(model, plan, losses)
    undo_rescaling(model)
    if str(getattr(model, "quantization_method", "")).endswith(("GGUF", "gguf")):
        clear_gguf_marks(model)
    dtype = model.config.dtype
    with new_folder(Path(path), overwrite) as folder:
        try:
            model.save_pretrained(folder)
            model.config.dtype = dtype  # which save_pretrained turns into a word
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {path}: {error}") from error
        except (ValueError, NotImplementedError) as error:
            message = f"transformers cannot save {type(model).__name__}: {error}"
            raise ModelError(message) from error
        if plan is not None:
            plan.save(folder / PLAN_FILE)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def _exports(
    model: PreTrainedModel, plan: Plan, losses: tuple[Loss, Loss] | None
) -> dict[str, str]:
    left = len(find_layers(model))
    if len(plan.survivors) != left:
        raise PlanError(
            f"the plan leaves {len(plan.survivors)} layers, and the model has {left}: save the "
            f"model that the plan was carried out on"
        )
    source = str(model.name_or_path) or (plan.model.name if plan.model else type(model).__name__)
    dtype = stored_dtype(model)
    python = (
        f"model, tokenizer = sh.load_model({source!r}, dtype={dtype!r})\n"
        f"plan = sh.drop_layers(model, {range_list(plan)})\n"
        f"sh.save_model(model, tokenizer, 'cut', plan)"
    )
    options = ("--dtype", dtype)
    return exports(plan, source, python, options, dtype, Path(source) / CARD_FILE, losses)
