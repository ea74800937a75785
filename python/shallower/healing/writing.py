"""What a healing leaves behind: adapters or a merged checkpoint, with plan, card and curve."""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..artifacts import PLAN_FILE
from ..errors import MissingExtraError
from ..evaluation import evaluate_loss
from ..exports import CARD_FILE, EXPORT_FILES, adapters_card, healed_card
from ..figures import healing_curve
from ..patching.writing import PATCH_FILE
from ..storage import write_file
from .merging import Merger
from .recipe import GLOBAL_BATCH
from .record import CURVE_FILE, Healing

_MERGED = "low-rank adapters were trained and merged into its weights."


def _rows(healing: Healing) -> list[tuple[str, str]]:
    """What a model card says of a healing."""
    recipe = healing.recipe
    kind = "packed" if recipe.packing else "truncated"
    rows = [
        ("trained", f"step {healing.best_step} of {recipe.steps}, {GLOBAL_BATCH} sequences each"),
        ("texts", f"{healing.texts.num_texts}, {kind} to {recipe.max_length} tokens"),
        (
            "adapters",
            f"rank {recipe.rank} on {healing.adapted} linear maps of the feed-forward "
            f"{'and attention ' if recipe.attention else ''}parts, peak rate "
            f"{recipe.learning_rate:g}, base in {recipe.dtype}",
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
    """Write the curve, if it can be drawn."""
    try:
        write_file(folder / CURVE_FILE, healing_curve(healing))
    except MissingExtraError as error:
        warnings.warn(f"{error}; the curve is left out", stacklevel=2)


def _copy(source: str, folder: Path, names: Iterable[str]) -> None:
    """Carry files beside a local model over, where they are there."""
    for name in names:
        file = Path(source).expanduser() / name
        if file.is_file():
            write_file(folder / name, file.read_bytes())


_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def write_adapters(
    folder: Path,
    path: str,
    checkpoint: Path,
    healing: Healing,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a repository of peft with all but its record."""
    _copy(str(checkpoint), folder, _ADAPTER_FILES)
    tokenizer.save_pretrained(folder)
    _copy(path, folder, (PATCH_FILE,))
    healing.plan.save(folder / PLAN_FILE)
    card = adapters_card(healing.plan, path, Path(path) / CARD_FILE, _rows(healing))
    write_file(folder / CARD_FILE, card.encode())


def write_merged(
    folder: Path,
    base: str,
    adapters: Path,
    healing: Healing,
    held_out: list[str] | None,
    trained: torch.Tensor | None,
    trust_remote_code: bool,
) -> Healing:
    """Write the merged checkpoint with all but its record; gives the record."""
    merger = Merger(base, adapters, healing, trust_remote_code)
    model = merger.merged()
    model.save_pretrained(folder)
    merger.tokenizer.save_pretrained(folder)
    merged = merger.check(folder, trained)
    if held_out:
        recipe = healing.recipe
        loss = evaluate_loss(
            model, merger.tokenizer, held_out, recipe.max_length, recipe.batch_size, False
        )
        merged = replace(merged, loss=loss)
    healing = replace(healing, merge=merged)
    _copy(base, folder, (PATCH_FILE, *(name for name in EXPORT_FILES if name != CARD_FILE)))
    healing.plan.save(folder / PLAN_FILE)
    write_file(
        folder / CARD_FILE, healed_card(Path(base) / CARD_FILE, _MERGED, _rows(healing)).encode()
    )
    return healing
