"""The folder that a merge leaves: checkpoint, plan, card, curve and record."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from ..cutting.cards import healed_card
from ..cutting.exports import EXPORT_FILES
from ..cutting.source import CARD_FILE, PLACEHOLDER, find_source
from ..errors import MissingExtraError, ModelError, OutputError, why
from ..models.source import ModelSource
from ..reporting.charts.run import healing_chart
from ..results.healing import Healing
from ..settings.recipe import GLOBAL_BATCH
from ..storage import check_apart, check_free, new_folder, write_file
from ..values.counts import counted
from ..values.files import HEALING_FIGURE, HEALING_FILE, PATCH_FILE, PLAN_FILE
from ..values.provenance import command_line, option_words
from .adapter_config import remembered_base
from .merging import Merging

_MERGED = "low-rank adapters were trained and merged into its weights."


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

    The sum of a weight and its adapter is made in float32, and rounded once to the stored dtype.
    Weights go one by one from file to file. So a model of any size is merged in the memory of a few
    rows and of the adapters. Then stock transformers loads the new checkpoint, and its logits are
    compared with those of the adapters on the model. That takes four bytes and a half a parameter;
    where they are not free, every weight is read back instead, and compared with its sum in
    float64.

    Args:
        adapters: the folder that :func:`shallower.heal` left.
        out: a folder that does not exist yet, or is empty.
        model: the cut; by default where it was when it was healed.
        overwrite: replace an earlier output at ``out``, once the new folder is complete.
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
    if find_spec("peft") is None:
        raise MissingExtraError("peft", "heal", "merging adapters")
    adapters, out = Path(adapters), Path(out)
    check_apart(out, [adapters, model])
    check_free(out, overwrite)
    healing = Healing.load(adapters)
    if healing.merge is not None:
        raise ModelError(f"{adapters} is merged already: expected a folder of adapters")
    if healing.best_step == 0:
        raise ModelError(f"{adapters} is a patched cut without adapters: there is nothing to merge")
    base = str(model or remembered_base(adapters))
    check_apart(out, [base])
    with new_folder(out, overwrite, ModelSource(base).stored_bytes) as folder:
        try:
            merging = Merging(
                base, adapters, healing, progress=progress, trust_remote_code=trust_remote_code
            )
            healing = write_merged(folder, merging)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {out}: {why(error, out)}") from error
        write_curve(folder, healing)
        write_file(folder / HEALING_FILE, healing.to_bytes())
    return healing


def write_merged(folder: Path, merging: Merging) -> Healing:
    """Fill a folder with a merged checkpoint; give the record with its comparison, unwritten."""
    base = merging.base
    healing = replace(merging.healing, merge=merging.into(folder))
    copy_beside(base, folder, (PATCH_FILE, *(name for name in EXPORT_FILES if name != CARD_FILE)))
    copy_files(find_source(base).licenses, folder)
    healing.plan.save(folder / PLAN_FILE)
    card = healed_card(
        Path(base).expanduser() / CARD_FILE,
        _MERGED,
        healing_rows(healing),
        command=healing_command(healing, merging.trust_remote_code),
    )
    write_file(folder / CARD_FILE, card.encode())
    return healing


def healing_rows(healing: Healing) -> list[tuple[str, str]]:
    """The rows of a model card that describe a healing."""
    recipe = healing.recipe
    rows = [
        ("trained", f"step {healing.best_step} of {recipe.steps}, {GLOBAL_BATCH} sequences each"),
        ("objective", recipe.objective),
        *_trained_on(healing),
        (
            "adapters",
            f"rank {recipe.rank} on {healing.adapted} linear maps of the feed-forward "
            f"{'and attention ' if recipe.attention else ''}parts, peak rate "
            f"{recipe.learning_rate:g}, base in {recipe.dtype}",
        ),
    ]
    if healing.before and healing.after:
        step = f"{healing.before} before the first step, {healing.after} at the best one"
        rows.append(("loss of the selection set", f"{step}, nats a token"))
    if healing.cut:
        rows.append(("on them, unpatched", f"{healing.cut} nats a token"))
    if healing.original:
        rows.append(("on them, uncut", f"{healing.original} nats a token"))
    if healing.merge and healing.merge.loss:
        merged = f"{healing.merge.loss} nats a token, in {healing.merge.dtype}"
        rows.append(("on them, merged", merged))
    return rows


def _trained_on(healing: Healing) -> Iterator[tuple[str, str]]:
    """The rows of texts and of answers."""
    recipe, answers = healing.recipe, healing.answers
    kind = "packed" if recipe.packing else "truncated"
    length = f"{kind} to {counted(recipe.max_length, 'token')}"
    if healing.texts.num_texts or answers is None:
        yield "texts", f"{healing.texts.num_texts}, {length}"
    if answers is not None and recipe.share is not None:
        share = f"{100 * recipe.share:g} % of the sequences"
        yield "answers", f"{answers}, {share}, {length}"


def healing_command(healing: Healing, trust_remote_code: bool = False) -> str:
    """Write the command that heals a cut again, with all that its result depends on."""
    recipe = asdict(healing.recipe)
    for name in ("batch_size", "recompute"):  # what the memory of a machine decides
        del recipe[name]
    for name in ("packing", "attention"):
        recipe[f"no_{name}"] = not recipe[name]
    has_original = healing.original or healing.recipe.has_teacher or healing.answers
    options = {
        "texts": "TEXTS" if healing.texts.num_texts or not healing.answers else None,
        "answers": "ANSWERS" if healing.answers else None,
        "eval_texts": "EVAL_TEXTS" if healing.held_out else None,
        "original": PLACEHOLDER if has_original else None,
        **recipe,
        "trust_remote_code": trust_remote_code,
        "merge": True,
        "out": "healed",
    }
    return command_line("heal", "cut", *option_words(options))


def write_curve(folder: Path, healing: Healing) -> None:
    """Write the curve of a healing; warn where matplotlib is missing."""
    try:
        write_file(folder / HEALING_FIGURE, healing_chart(healing).rendered("png"))
    except MissingExtraError as error:
        warnings.warn(f"{error}; the curve is left out", stacklevel=2)


def copy_beside(source: str, folder: Path, names: Iterable[str]) -> None:
    """Copy files from beside a local model, where there are any."""
    copy_files({name: Path(source).expanduser() / name for name in names}, folder)


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files, where they are there, under the names that they are given."""
    for name, file in files.items():
        if file.is_file():
            write_file(folder / name, file.read_bytes())
