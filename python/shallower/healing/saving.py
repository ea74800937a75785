"""The folders that a patch and a healing leave: checkpoint or adapters, plan, card and curve."""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.card_file import CARD_FILE
from ..cutting.cards import adapters_card, healed_card
from ..cutting.exports import EXPORT_FILES
from ..cutting.saving import save_model
from ..cutting.source import find_source
from ..errors import MissingExtraError, ModelError, OutputError
from ..merging.merging import Merging
from ..merging.stored_adapters import read_adapter_config
from ..reporting.figures import healing_curve
from ..storage import check_free, new_folder, write_file
from ..values.files import PLAN_FILE
from ..values.healing import CURVE_FILE, HEALING_FILE, Healing
from ..values.loss import Loss
from ..values.patch import Patch
from ..values.recipe import GLOBAL_BATCH
from .checks import require_peft

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


_MERGED = "low-rank adapters were trained and merged into its weights."
_RECONSTRUCTED = "the layer before each block was fitted to the states of its source."


def _healing_rows(healing: Healing) -> list[tuple[str, str]]:
    """The rows of a model card that tell of a healing."""
    recipe = healing.recipe
    kind = "packed" if recipe.packing else "truncated"
    rows = [
        ("trained", f"step {healing.best_step} of {recipe.steps}, {GLOBAL_BATCH} sequences each"),
        ("objective", recipe.objective),
        ("texts", f"{healing.texts.num_texts}, {kind} to {recipe.max_length} tokens"),
        (
            "adapters",
            f"rank {recipe.rank} on {healing.adapted} linear maps of the feed-forward "
            f"{'and attention ' if recipe.attention else ''}parts, peak rate "
            f"{recipe.learning_rate:g}, base in {recipe.dtype}",
        )
        if recipe.has_adapters
        else (
            "trained weights",
            f"{healing.adapted}, all of the layer before each block, peak rate "
            f"{recipe.learning_rate:g}, products in {recipe.dtype}",
        ),
    ]
    if healing.before and healing.after:
        rows.append(("held-out loss", f"{healing.before} → {healing.after} nats a token"))
    if healing.cut:
        rows.append(("held-out loss, unpatched", f"{healing.cut} nats a token"))
    if healing.original:
        rows.append(("held-out loss, uncut", f"{healing.original} nats a token"))
    if healing.merge and healing.merge.loss:
        rows.append(("held-out loss, merged", f"{healing.merge.loss} nats a token"))
    return rows


def draw(folder: Path, healing: Healing) -> None:
    """Write the curve of a healing, if it can be drawn.

    Args:
        folder: the folder of the healing.
        healing: its record.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        write_file(folder / CURVE_FILE, healing_curve(healing))
    except MissingExtraError as error:
        warnings.warn(f"{error}; the curve is left out", stacklevel=2)


def _copy(source: str, folder: Path, names: Iterable[str]) -> None:
    """Copy files from beside a local model, where there are any."""
    _carry({name: Path(source).expanduser() / name for name in names}, folder)


def _carry(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files, where they are there, under the names that they are given."""
    for name, file in files.items():
        if file.is_file():
            write_file(folder / name, file.read_bytes())


_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def write_adapters(
    folder: Path,
    path: str,
    checkpoint: Path,
    *,
    healing: Healing,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a repository of peft, without the record of the healing.

    Args:
        folder: the folder to fill.
        path: the cut that was trained, a folder or hub id.
        checkpoint: the Trainer's checkpoint that is kept.
        healing: the record.
        tokenizer: the tokenizer of the cut.

    Raises:
        OutputError, OSError: a file cannot be written.
    """
    _copy(str(checkpoint), folder, _ADAPTER_FILES)
    tokenizer.save_pretrained(folder)
    cut = find_source(path)
    _copy(path, folder, (PATCH_FILE,))
    _carry(cut.licenses, folder)
    healing.plan.save(folder / PLAN_FILE)
    card = adapters_card(healing.plan, cut, rows=_healing_rows(healing))
    write_file(folder / CARD_FILE, card.encode())


def write_merged(
    folder: Path,
    base: str,
    adapters: Path,
    *,
    healing: Healing,
    held_out: list[str] | None = None,
    trained: torch.Tensor | None = None,
    progress: bool | None = None,
    trust_remote_code: bool = False,
) -> Healing:
    """Write a merged checkpoint, without the record of the healing.

    Args:
        folder: the folder to fill.
        base: the cut that was trained, a folder or hub id.
        adapters: the folder of the adapters.
        healing: the record.
        held_out: texts to measure the merged model on.
        trained: the logits of the adapters on the model as it was trained.
        progress: whether to show bars on standard error; by default if that is a terminal.
        trust_remote_code: run code that comes with the model.

    Returns:
        The record with the comparison of the merged model.

    Raises:
        ModelError: the adapters are another model's, or the result differs.
        OutputError, OSError: a file cannot be written.
    """
    merging = Merging(
        base, adapters, healing, held_out=held_out, trained=trained, progress=progress,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    healing = replace(healing, merge=merging.into(folder))
    _finish(folder, base, _MERGED, healing)
    return healing


def write_reconstructed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base: str,
    healing: Healing,
) -> None:
    """Write a checkpoint whose layers were fitted locally, without the record of the healing.

    Args:
        model: the cut with its new weights.
        tokenizer: the tokenizer of the cut.
        folder: an empty folder, to fill.
        base: the cut that was trained, a folder or hub id.
        healing: the record.

    Raises:
        OutputError, OSError: a file cannot be written.
    """
    folder.rmdir()
    save_model(model, tokenizer, folder)
    _finish(folder, base, _RECONSTRUCTED, healing)


def _finish(folder: Path, base: str, what: str, healing: Healing) -> None:
    """Write what lies beside the weights of a healed cut."""
    _copy(base, folder, (PATCH_FILE, *(name for name in EXPORT_FILES if name != CARD_FILE)))
    _carry(find_source(base).licenses, folder)
    healing.plan.save(folder / PLAN_FILE)
    card = healed_card(Path(base).expanduser() / CARD_FILE, what, _healing_rows(healing))
    write_file(folder / CARD_FILE, card.encode())


def merge(
    adapters: str | Path,
    out: str | Path,
    model: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
    trust_remote_code: bool = False,
) -> Healing:
    """Fold the adapters of :func:`shallower.heal` into the unquantised weights of the cut.

    The sum of a weight and its adapter is made in float32, and rounded once to the dtype that
    the model is stored in, weight by weight from file to file: a model of any size is merged in
    the memory of a few of its rows and of the adapters. Then the new checkpoint is loaded by
    stock transformers, and its logits are compared with those of the adapters on the model. That
    takes four bytes and a half a parameter; where they are not free, every weight is read back
    instead, and compared with its sum in float64.

    Args:
        adapters: the folder that :func:`shallower.heal` left.
        out: a folder that does not exist yet, or is empty.
        model: the cut; by default where it was when it was healed.
        overwrite: replace what is at ``out``, once the new folder is complete.
        progress: whether to show a bar on standard error; by default if that is a terminal.
        trust_remote_code: run code that comes with the model.

    Returns:
        The record of the healing, with the comparison of the merged model.

    Raises:
        ModelError: no adapters of shallower, adapters of another model, quantised weights,
            adapters that are not finite, or a result that differs.
        OutputError: ``out`` holds something already, or cannot be written to.
        MissingExtraError: peft is not installed.
    """
    require_peft("merging adapters")
    adapters, out = Path(adapters), Path(out)
    check_free(out, overwrite)
    healing = Healing.load(adapters)
    if healing.merge is not None:
        raise ModelError(f"{adapters} is merged already: expected a folder of adapters")
    if not healing.recipe.has_adapters:
        raise ModelError(f"{adapters} is a whole checkpoint without adapters: nothing to merge")
    if healing.best_step == 0:
        raise ModelError(f"{adapters} is a patched cut without adapters: there is nothing to merge")
    base = str(model or _remembered_base(adapters))
    with new_folder(out, overwrite) as folder:
        try:
            healing = write_merged(
                folder, base, adapters, healing=healing, progress=progress,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {out}: {error}") from error
        draw(folder, healing)
        write_file(folder / HEALING_FILE, healing.to_bytes())
    return healing


def _remembered_base(adapters: Path) -> str:
    base = read_adapter_config(adapters).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ModelError(f"the adapters in {adapters} name no model: name the cut (model, --model)")
    return base
