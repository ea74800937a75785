"""The folder that a patch leaves: the checkpoint, its report and a card."""

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.cards import healed_card
from ..cutting.in_model import without_layers
from ..cutting.laid_over import require_whole
from ..cutting.saving import save_cut
from ..cutting.source import CARD_FILE
from ..errors import PatchError, raise_output_error
from ..evaluation.batches import Stores, UnsavedResults, unkept
from ..evaluation.loss import measure_loss, out_of_domain_texts, require_predictable
from ..memory.weights import module_bytes
from ..models.decoder import Decoder
from ..models.source import ModelSource, place_of
from ..progress import track
from ..reporting.words import by_choice, came_back
from ..results.loss import OUT_OF_DOMAIN, TEST_SET, Loss, recovered
from ..results.patch import Patch
from ..results.scores import Estimate
from ..results.speech import Answer
from ..settings.stages import PatchSettings
from ..storage import check_apart, check_free, check_room, resumable_folder
from ..texts.sources import OWN_TOKENS, place_of_texts
from ..values.counts import counted
from ..values.entries import ResultStore
from ..values.files import PATCH_FILE
from ..values.layers import Layers, drop_option
from ..values.plan import Plan
from ..values.provenance import option_words
from ..values.tokens import Tokens
from .patch import patch, plan_of

_KEPT = "patching"
"""The folder that an interrupted patch resumes from."""

_PATCHED = "matrices beside it were solved anew by least squares."


def save_patched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    *,
    done: Patch,
    overwrite: bool = False,
    losses: Mapping[str, Loss] | None = None,
    out_of_domain: Mapping[str, Loss] | None = None,
    more: Mapping[str, bytes] | None = None,
    command: str = "",
    tested: str = "",
    text_only: bool = False,
) -> None:
    """Save a patched model as a standard checkpoint.

    As by :func:`shallower.save_model`; ``shallower_patch.json`` and a card that describes the patch
    lie beside the weights.

    Args:
        model: the model as :func:`shallower.patch` left it.
        tokenizer: saved beside it, unless ``None``.
        path: a folder that does not exist yet, or is empty.
        done: what :func:`shallower.patch` gave; its plan is saved as well.
        overwrite: replace an earlier output at ``path``, once the new checkpoint is complete.
        losses: the losses ``whole``, ``cut`` and ``patched``, on text that no choice was made on.
        out_of_domain: the same on texts of other domains.
        more: files to put beside it, by name.
        command: the command line that made it, for the card; ``shallower patch`` by default.
        tested: the name of the texts that the losses are of, for the card.
        text_only: as for :func:`shallower.save_model`.

    Raises:
        OutputError, ModelError: as :func:`shallower.save_model`.
    """
    check_apart(path, [place_of(model)])
    check_free(Path(path), overwrite)

    measured = [of for of in (losses, out_of_domain) if of]

    def beside(folder: Path) -> Mapping[str, bytes]:
        shares = dict(zip((TEST_SET, OUT_OF_DOMAIN), map(recovered, measured), strict=False))
        card = healed_card(folder / CARD_FILE, _PATCHED, _patch_rows(done, shares))
        report = json.dumps(done.to_json(), indent=2) + "\n"
        return {CARD_FILE: card.encode(), PATCH_FILE: report.encode(), **(more or {})}

    save_cut(
        model,
        tokenizer,
        path,
        plan=done.plan,
        overwrite=overwrite,
        losses=tuple(of[name] for of in measured for name in ("whole", "patched")) or None,
        tested=tested,
        command=command or _command(done, measured=bool(losses)),
        beside=beside,
        text_only=text_only,
    )


def _command(done: Patch, *, measured: bool) -> str:
    """Write the command that makes a patch again, of a source that is named later."""
    options = {
        "drop": drop_option(done.plan.blocks),
        "texts": "TEXTS",
        "answers": None if done.share is None else "ANSWERS",
        "no_answers": done.share is None or None,
        "share": done.share,
        "eval_texts": "EVAL_TEXTS" if measured else None,
        "max_length": done.max_length or None,
        "batch_size": done.batch_size or None,
        "num_tokens": done.most_tokens or None,
        "out": "cut",
    }
    return f"shallower patch {{source}} {shlex.join(option_words(options))}"


def _patch_rows(done: Patch, shares: Mapping[str, Estimate]) -> list[tuple[str, str]]:
    rows = [
        ("method", done.method),
        ("tokens fitted", f"{done.num_tokens:,}{_among(done)}"),
        (
            "loss, nats a token",
            f"{done.original:.4f} whole, {done.cut:.4f} cut, {done.patched:.4f} patched, on "
            f"{counted(done.num_held_out, 'token')} that choices were made on",
        ),
        ("recovered", came_back({**shares, **by_choice(done)})),
    ]
    changed = ", ".join(name for fit in done.fits for name in fit.matrices)
    if changed:
        rows.append(("matrices solved anew, by source layer", changed))
    if done.descent:
        behind = f"all matrices of the source layers from {done.fits[0].layer} on that are left"
        rows.append(("took steps towards the source's distributions and the next tokens", behind))
    return rows


def _among(done: Patch) -> str:
    """How many of what was fitted are answers, if any are."""
    return "" if done.share is None else f", up to {100 * done.share:g} % of the texts answers"


def patch_to_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Plan | Layers,
    *,
    texts: Iterable[str],
    out: str | Path,
    eval_texts: Iterable[str] | None = None,
    answers: Sequence[Answer] = (),
    settings: PatchSettings | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    text_only: bool = False,
    source: ModelSource | None = None,
    stores: Stores = unkept,
) -> tuple[Patch, dict[str, dict[str, Loss]]]:
    """Patch a model in place, save it, and measure it on text that no choice was made on.

    An interrupted patch resumes. Without ``eval_texts`` nothing is measured. The losses, in nats a
    token, are named ``whole``, ``cut`` and ``patched``, by their texts; those of a model from
    ``source`` are cached in ``stores``.
    """
    settings = settings or PatchSettings()
    check_apart(out, [place_of(model), place_of_texts(texts), place_of_texts(eval_texts)])
    check_free(Path(out), overwrite)
    decoder = Decoder.of(model)
    plan = plan_of(model, layers)
    require_whole(model, text_only)
    held_out: dict[str, list[str]] = {}
    if eval_texts is not None:
        held_out[TEST_SET] = list(eval_texts)
        require_predictable(tokenizer, held_out[TEST_SET], settings.max_length)
        held_out[OUT_OF_DOMAIN] = out_of_domain_texts(tokenizer, settings.max_length)
    lengths = {TEST_SET: settings.max_length, OUT_OF_DOMAIN: min(settings.max_length, OWN_TOKENS)}
    measured: dict[str, dict[str, Loss]] = {place: {} for place, some in held_out.items() if some}

    of_model, of_patched = None if source is None else stores(source), UnsavedResults()

    def measure(name: str, store: ResultStore | None, dropped: Plan | None = None) -> None:
        for place in measured:
            measured[place][name] = measure_loss(
                decoder,
                tokenizer,
                held_out[place],
                tokens=Tokens(lengths[place]),  # as eval measures by default
                plan=dropped,
                store=store,
                progress=progress,
                description=f"loss, {name}, {place}",
            )

    gone = sum(module_bytes(decoder.layers.modules[layer]) for layer in plan.dropped)
    with resumable_folder(Path(out), "patch", overwrite) as folder:
        kept, made = folder / _KEPT, folder / "checkpoint"
        with raise_output_error(Path(out)):
            _keep_alone(kept)
        check_room(Path(out), module_bytes(model) - gone)
        measure("whole", of_model)
        with without_layers(model, plan.blocks):
            measure("cut", of_model, plan)
        try:
            done = patch(
                model,
                tokenizer,
                plan,
                texts=texts,
                answers=answers,
                settings=settings,
                checkpoint=kept,
                progress=progress,
            )
        except PatchError:  # it would end so again
            shutil.rmtree(kept, ignore_errors=True)
            raise
        measure("patched", of_patched)
        with track("save the patched model", show=progress):
            save_patched(
                model,
                tokenizer,
                made,
                done=done,
                overwrite=True,
                losses=measured.get(TEST_SET),
                out_of_domain=measured.get(OUT_OF_DOMAIN),
                tested=place_of_texts(eval_texts) or "",
                text_only=text_only,
            )
        with raise_output_error(Path(out)):
            for file in made.iterdir():
                file.replace(folder / file.name)
            made.rmdir()
            shutil.rmtree(kept, ignore_errors=True)
    if source is not None:
        saved = replace(source, path=out, gguf_file=None)
        of_patched.keep(stores, saved, decoder.identity.dtype)
    return done, measured


def _keep_alone(kept: Path) -> None:
    """Delete what lies beside a folder, left by an earlier run that was killed as it saved."""
    for left in kept.parent.iterdir():
        if left.is_dir() and left != kept:
            shutil.rmtree(left)
        elif left != kept:
            left.unlink()
