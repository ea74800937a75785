"""A model patched into a folder, measured before the cut, after it, and after the patch."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.in_model import without_layers
from ..evaluation.loss import evaluate_loss, require_predictable
from ..models.decoder import Decoder
from ..storage import check_free
from ..values.layers import Layers
from ..values.loss import Loss
from ..values.patch import Patch
from ..values.plan import Plan
from .patch import patch
from .saving import save_patched


def patch_to_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Plan | Layers,
    *,
    texts: Iterable[str],
    out: str | Path,
    eval_texts: Iterable[str] | None = None,
    max_length: int = 256,
    batch_size: int = 16,
    num_tokens: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> tuple[Patch, dict[str, Loss]]:
    """Patch a model in place, save it, and measure it on text that no choice was made on.

    ``texts`` are calibration texts, as for :func:`shallower.patch`; without ``eval_texts`` nothing
    is measured. The losses, in nats a token, are named ``whole``, ``cut`` and ``patched``. Raises
    as :func:`shallower.patch`, and OutputError if ``out`` is in use or cannot be written to.
    """
    check_free(Path(out), overwrite)
    decoder = Decoder.of(model)
    plan = Plan.of(len(decoder), layers)
    plan.check_model(decoder.identity)
    held_out = [] if eval_texts is None else list(eval_texts)
    if eval_texts is not None:
        require_predictable(tokenizer, held_out, max_length)
    losses: dict[str, Loss] = {}

    def measure(name: str) -> None:
        if held_out:
            losses[name] = evaluate_loss(
                decoder, tokenizer, held_out, max_length=max_length, batch_size=batch_size,
                progress=progress, description=f"loss, {name}",
            )  # fmt: skip

    measure("whole")
    with without_layers(model, plan.blocks):
        measure("cut")
    done = patch(
        model, tokenizer, plan, texts=texts, max_length=max_length,
        batch_size=batch_size, num_tokens=num_tokens, progress=progress,
    )  # fmt: skip
    measure("patched")
    before_and_after = (losses["whole"], losses["patched"]) if losses else None
    save_patched(model, tokenizer, out, done=done, overwrite=overwrite, losses=before_and_after)
    return done, losses
