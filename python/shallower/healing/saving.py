"""The folder that a healing leaves whose adapters are not merged: a repository of peft."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.cards import adapters_card
from ..cutting.saving import save_model
from ..cutting.source import CARD_FILE, find_source
from ..merging.merge import copy_beside, copy_files, healing_rows, write_beside
from ..patching.saving import PATCH_FILE
from ..storage import write_file
from ..values.files import PLAN_FILE
from ..values.healing import Healing

_RECONSTRUCTED = "the layer before each block was fitted to the states of its source."
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
    copy_beside(str(checkpoint), folder, _ADAPTER_FILES)
    tokenizer.save_pretrained(folder)
    cut = find_source(path)
    copy_beside(path, folder, (PATCH_FILE,))
    copy_files(cut.licenses, folder)
    healing.plan.save(folder / PLAN_FILE)
    card = adapters_card(healing.plan, cut, rows=healing_rows(healing))
    write_file(folder / CARD_FILE, card.encode())


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
    write_beside(folder, base, _RECONSTRUCTED, healing)
