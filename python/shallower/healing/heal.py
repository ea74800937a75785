"""The healing of a cut, from its folder to the adapters or the merged model. The stages joined."""

import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from ..cutting.memory import without_layers
from ..errors import ModelError, OutputError, PlanError, RecipeError, TextsError
from ..evaluation.loss import evaluate_loss, require_predictable
from ..models.decoder import Decoder
from ..models.feed_forward import feed_forward_targets
from ..models.identity import stored_digest
from ..processes import is_main_process
from ..progress import track
from ..storage import check_free, write_file
from ..texts.batches import TokenBatches
from ..texts.sequences import ReadOnce, read_samples
from ..values.healing import HEALING_FILE, Healing
from ..values.identity import TextsIdentity
from ..values.loss import Loss
from ..values.plan import Plan
from ..values.recipe import GLOBAL_BATCH, Recipe, Resolved
from ..values.tokens import Tokens
from .checks import read_plan, require_one_process, require_peft, resolve
from .job import describe_job, work_folder
from .losses import Distillation
from .measured import MeasuredLosses
from .merging import stored_plainly, trained_logits
from .patched import PATCHED, copy_to, patched_cut, settle
from .saving import PATCH_FILE, draw, write_adapters, write_merged
from .training import Trained, add_adapters, computing, train
from .uncut import Uncut, load_placed

_TRAINING = "training"
_LOSSES = "losses.json"


def heal(
    path: str | Path,
    texts: Iterable[str],
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    eval_texts: Iterable[str] | None = None,
    original: str | Path | None = None,
    merge: bool = False,
    from_patch: bool = False,
    losses: tuple[Loss | None, Loss | None] = (None, None),
    overwrite: bool = False,
    progress: bool | None = None,
    trust_remote_code: bool = False,
) -> Healing:
    """Heal a cut by training low-rank adapters, as the paper does (2403.17887, appendix A).

    Leaves in ``out`` the adapters, or with ``merge`` a standard checkpoint; ``healing.json`` and,
    with matplotlib, ``healing.png``; the plan and a model card. A killed run goes on when it is
    called again with the same arguments, from its last complete checkpoint.

    Args:
        path: the cut: a folder or hub id with a plan beside the weights.
        texts: texts to train on, read once, and only as many as the steps take.
        out: a folder that does not exist yet, or is empty.
        recipe: the settings; by default those of the paper where it healed this model, else
            ours.
        eval_texts: held-out texts; the adapters of the least loss on them are kept.
        original: the uncut model: its held-out loss is measured, and it teaches if the recipe
            distils.
        merge: fold the adapters into the unquantised weights of the cut.
        from_patch: patch the cut in closed form first, by :func:`shallower.patch` of ``original``
            on ``texts``, and train on from there. Adapters that are not merged need the patched
            cut, which lies beside them. If no step of the training is better than the patch,
            ``out`` is the patched cut, with a warning.
        losses: the losses of the uncut model and of the cut before a patch, in nats a token on
            ``eval_texts`` at the recipe's ``max_length``, where they were measured already; what
            is given is not measured again.
        overwrite: replace what is at ``out``, once the new folder is complete.
        progress: whether to show bars with ETA on standard error; by default if that is a
            terminal.
        trust_remote_code: run code that comes with the models.

    Returns:
        The record that is in ``healing.json``.

    Raises:
        PlanError: the model was not cut, or not out of ``original``.
        RecipeError: settings that do not fit.
        TextsError: too few texts, or none that are held out.
        PatchError: ``from_patch``, and the patch does not help.
        ModelError: nothing to adapt, weights that cannot be merged into, a loss that is not
            finite or at no step below that before healing.
        OutputError: ``out`` holds something already, or cannot be written to.
        MissingExtraError: peft, or bitsandbytes for 4 and 8 bits, is not installed.
        ProcessesError: ``from_patch`` in several processes, or one of them ended.

    Example:
        >>> recipe = sh.Recipe(steps=2, dtype="float32", max_length=16)
        >>> healing = sh.heal("smol-22-layers", texts, "adapters", recipe=recipe)
        >>> healing.recipe.preset, healing.best_step
        ('small', 2)
        >>> merged = sh.merge("adapters", "healed")
        >>> merged.merge.difference < 1e-5
        True
    """
    require_peft()
    path, out, recipe = str(path), Path(out), recipe or Recipe()
    check_free(out, overwrite)
    recipe.check(original=original is not None, from_patch=from_patch)
    if eval_texts is None and losses != (None, None):
        raise RecipeError("losses without eval_texts: give the texts that they were measured on")
    held_out = None if eval_texts is None else list(eval_texts)
    source = ReadOnce(texts)
    if not any(True for _ in source):
        raise TextsError("there are no texts to heal with")
    plan = read_plan(path)
    resolved = resolve(path, plan, recipe, trust_remote_code=trust_remote_code)
    dtype = stored_plainly(path, trust_remote_code) if merge or from_patch else ""
    uncut = None
    if original is not None:
        uncut = Uncut(str(original), plan, trust_remote_code=trust_remote_code)
    patched = None
    if from_patch and uncut is not None:
        require_one_process()
        patched = patched_cut(
            path, plan, uncut.name, texts=source, out=out, whole=lambda: uncut.load(dtype),
            max_length=resolved.max_length, progress=progress,
        )  # fmt: skip
        if dtype != resolved.dtype:
            uncut.release()
    done = _Run(
        path, plan, resolved, source.last_pass(), held_out, uncut, merge, losses, progress,
        trust_remote_code, patched,
    ).to(out, overwrite)  # fmt: skip
    if patched is not None:
        shutil.rmtree(patched, ignore_errors=True)
        if done.best_step == 0:
            warnings.warn(
                f"no step of the training was better than the patch: {out} is the patched cut, "
                f"and holds no adapters. Lower the learning rate (learning_rate, "
                f"--learning-rate), or give more texts",
                stacklevel=2,
            )
    return done


@dataclass
class _Run:
    """A healing in progress."""

    cut: str
    plan: Plan
    recipe: Resolved
    texts: Iterable[str]
    held_out: list[str] | None
    uncut: Uncut | None
    merge: bool
    losses: tuple[Loss | None, Loss | None]
    progress: bool | None
    trust_remote_code: bool
    patched: Path | None

    @property
    def path(self) -> str:
        """The model that is trained."""
        return str(self.patched or self.cut)

    def to(self, out: Path, overwrite: bool) -> Healing:
        """Heal into a folder."""
        held_out = self.held_out
        model, tokenizer = load_placed(
            self.path, self.recipe.dtype, trust_remote_code=self.trust_remote_code
        )
        decoder = Decoder.of(model)
        self._require_plan_of(decoder)
        if held_out is not None:
            require_predictable(tokenizer, held_out, self.recipe.max_length)
        samples = read_samples(
            tokenizer, self.texts, max_length=self.recipe.max_length, packing=self.recipe.packing,
            num_samples=self.recipe.steps * GLOBAL_BATCH,
        )  # fmt: skip
        targets = feed_forward_targets(model, self.recipe.attention)
        recipe = self.recipe.without_dropout() if targets.parameters else self.recipe
        healing = Healing(
            model=decoder.identity,
            weights=stored_digest(self.path),
            plan=self.plan,
            recipe=recipe,
            adapted=len(targets),
            texts=samples.identity,
            steps=(),
            held_out=(),
            best_step=0,
        )
        evaluated = held_out if held_out is None else self._identity(tokenizer, held_out)
        job = describe_job(healing, evaluated, merge=self.merge)
        with work_folder(out, job, overwrite=overwrite) as folder:
            if (folder / HEALING_FILE).is_file() and not (folder / _TRAINING).exists():
                return Healing.load(folder)  # all that was left to do was to rename the folder
            known = MeasuredLosses(folder / _LOSSES, self._given())
            if held_out:
                healing = self._with_losses_of_uncut(healing, known, tokenizer, held_out)
            distillation = None
            if self.uncut is not None and recipe.distill:
                teacher, _ = self.uncut.load(recipe.dtype)
                distillation = Distillation(model, teacher, self.plan)
            elif self.uncut is not None:
                self.uncut.release()
            adapted = add_adapters(model, targets, recipe, base=self._base(out))

            def measure() -> Loss:
                with computing(recipe, decoder.device):
                    return self._loss(decoder, tokenizer, held_out or [], "loss, held out")

            def loss(step: int) -> Loss:
                return measure() if step else known.get("before", measure)

            with track("heal", recipe.steps, self._show_progress) as advance:
                trained = train(
                    adapted, samples, recipe, folder=folder / _TRAINING,
                    held_out=loss if held_out else None, distillation=distillation,
                    advance=advance,
                )  # fmt: skip
            healing = replace(
                healing,
                steps=trained.steps,
                held_out=trained.held_out,
                best_step=trained.best_step,
                tokens_per_second=trained.tokens_per_second,
            )
            if not _is_better(healing):
                healing = self._without_training(healing)
            if is_main_process():
                healing = self._write(folder, trained, healing, adapted, tokenizer, held_out)
        return healing

    def _require_plan_of(self, decoder: Decoder) -> None:
        layers = len(decoder)
        if len(self.plan.survivors) != layers:
            raise PlanError(
                f"the plan beside {self.path} leaves {len(self.plan.survivors)} layers, and the "
                f"model has {layers}: it is of another cut"
            )

    @property
    def _show_progress(self) -> bool | None:
        return self.progress if is_main_process() else False

    def _base(self, out: Path) -> str:
        """The name by which the adapters will find their model, from any folder."""
        if self.patched is not None:
            return str(out.absolute() / PATCHED)
        folder = Path(self.path).expanduser()
        return str(folder.resolve()) if folder.exists() else self.path

    @property
    def _starts_patched(self) -> bool:
        return (Path(self.path).expanduser() / PATCH_FILE).is_file()

    @property
    def _original(self) -> str:
        """The name of the uncut model's loss among those that are known."""
        return f"uncut {self.uncut.name if self.uncut else ''}"

    def _given(self) -> dict[str, Loss]:
        names = self._original, "cut" if self._starts_patched else "before"
        return {name: loss for name, loss in zip(names, self.losses, strict=True) if loss}

    def _with_losses_of_uncut(
        self,
        healing: Healing,
        known: MeasuredLosses,
        tokenizer: PreTrainedTokenizerBase,
        held_out: list[str],
    ) -> Healing:
        """The record with the losses of the uncut model, and of the cut before its patch."""

        def measure_uncut() -> Loss:
            assert self.uncut is not None
            model, _ = self.uncut.load(self.recipe.dtype)
            return self._loss(Decoder.of(model), tokenizer, held_out, "loss, uncut")

        def measure_cut() -> Loss:
            assert self.uncut is not None
            model, _ = self.uncut.load(self.recipe.dtype)
            decoder = Decoder.of(model)
            with without_layers(model, self.plan.blocks), computing(self.recipe, decoder.device):
                return self._loss(decoder, tokenizer, held_out, "loss, unpatched")

        given = self._given()
        if self.patched is not None or "cut" in given:
            healing = replace(healing, cut=known.get("cut", measure_cut))
        if self.uncut is not None or self._original in given:
            healing = replace(healing, original=known.get(self._original, measure_uncut))
        return healing

    def _loss(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        description: str,
    ) -> Loss:
        return evaluate_loss(
            decoder, tokenizer, texts, max_length=self.recipe.max_length,
            batch_size=self.recipe.batch_size, progress=self._show_progress,
            description=description,
        )  # fmt: skip

    def _identity(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> TextsIdentity:
        """The identity of the held-out texts, on which the losses that are given must be."""
        batches = TokenBatches(tokenizer, texts, Tokens(self.recipe.max_length, 64), min_tokens=2)
        num_tokens = sum(int(batch.attention_mask.sum()) - len(batch) for batch in batches)
        for loss in filter(None, self.losses):
            if loss.num_tokens != num_tokens:
                raise TextsError(
                    f"losses were measured on {loss.num_tokens} tokens, and eval_texts have "
                    f"{num_tokens} of at most {self.recipe.max_length} a text: measure them with "
                    f"max_length={self.recipe.max_length}, or leave them out"
                )
        return batches.identity

    def _without_training(self, healing: Healing) -> Healing:
        """The record where no step was better than the start: the patch is kept, if it began so."""
        if self.patched is not None:
            return replace(healing, best_step=0)
        raise ModelError(
            f"healing made it worse: the held-out loss was {healing.before} before it, and "
            f"{healing.after} at its best, step {healing.best_step}; nothing is saved. Lower the "
            f"learning rate (learning_rate, --learning-rate), or give more texts"
        )

    def _write(
        self,
        folder: Path,
        trained: Trained,
        healing: Healing,
        adapted: Any,
        tokenizer: PreTrainedTokenizerBase,
        held_out: list[str] | None,
    ) -> Healing:
        """Write everything that ``out`` holds; the record comes last, then the training goes."""
        try:
            if self.patched is not None and healing.best_step == 0:
                copy_to(self.patched, folder)
            elif self.merge:
                logits = None
                if healing.recipe.dtype in ("nf4", "int8"):
                    logits = trained_logits(
                        adapted, tokenizer, healing.recipe, checkpoint=trained.checkpoint
                    )
                healing = write_merged(
                    folder, self.path, trained.checkpoint, healing=healing, held_out=held_out,
                    trained=logits, progress=self._show_progress,
                    trust_remote_code=self.trust_remote_code,
                )  # fmt: skip
            else:
                base = self.path
                if self.patched is not None:
                    base = str(settle(self.patched, folder))
                write_adapters(
                    folder, base, trained.checkpoint, healing=healing, tokenizer=tokenizer
                )
            draw(folder, healing)
            (folder / _LOSSES).unlink(missing_ok=True)
            write_file(folder / HEALING_FILE, healing.to_bytes())
            shutil.rmtree(folder.parent / "done", ignore_errors=True)
            (folder / _TRAINING).rename(folder.parent / "done")
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write the healed model: {error}") from error
        return healing


def _is_better(healing: Healing) -> bool:
    """True if the held-out loss fell, or was not measured."""
    before, after = healing.before, healing.after
    return not (before and after and after.nats >= before.nats)
