"""The folder that a patch leaves: the checkpoint, its report and a card."""

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.card_file import CARD_FILE
from ..cutting.cards import healed_card
from ..cutting.saving import save_model
from ..storage import new_folder, write_file
from ..values.loss import Loss
from ..values.patch import Patch

PATCH_FILE = "shallower_patch.json"


def save_patched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    *,
    done: Patch,
    overwrite: bool = False,
    losses: tuple[Loss, Loss] | None = None,
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Save a patched model as a standard checkpoint.

    As by :func:`shallower.save_model`, with ``shallower_patch.json`` and a card that tells of
    the patch beside the weights.

    Args:
        model: the model as :func:`shallower.patch` left it.
        tokenizer: saved beside it, unless ``None``.
        path: a folder that does not exist yet, or is empty.
        done: what :func:`shallower.patch` gave; its plan is saved as well.
        overwrite: replace what is at ``path``, once the new checkpoint is complete.
        losses: the losses before the cut and after the patch, on text that no choice was made
            on.
        more: files to put beside it, by name.

    Raises:
        OutputError, ModelError: as :func:`shallower.save_model`.
    """
    with new_folder(Path(path), overwrite) as folder:
        folder.rmdir()
        save_model(model, tokenizer, folder, plan=done.plan, losses=losses)
        card = healed_card(folder / CARD_FILE, _PATCHED[done.method], _patch_rows(done))
        report = json.dumps(done.to_json(), indent=2) + "\n"
        beside = {CARD_FILE: card.encode(), PATCH_FILE: report.encode(), **(more or {})}
        for name, content in beside.items():
            write_file(folder / name, content)


_PATCHED = {
    "refit": "matrices beside it were solved anew by least squares.",
    "map": "a linear map was fused into the matrix before it; nothing was trained.",
    "magnitude": "the matrices behind it were scaled; nothing was trained.",
}


def _patch_rows(done: Patch) -> list[tuple[str, str]]:
    rows = [
        ("method", done.method),
        ("tokens fitted", f"{done.num_tokens:,}"),
        ("held-out loss, nats a token", f"{done.original:.4f} whole, {done.cut:.4f} cut, "
         f"{done.patched:.4f} patched, on {done.num_held_out:,} tokens that choices were made on"),
        ("lost nats recovered", f"{100 * done.recovered:.0f} %"),
    ]  # fmt: skip
    changed = ", ".join(name for fit in done.fits for name in fit.matrices)
    if changed:
        rows.append(("matrices solved anew, by source layer", changed))
    if done.descent:
        behind = f"all matrices of the source layers from {done.fits[0].layer} on that are left"
        rows.append(("took steps down the divergence from the source", behind))
    return rows
