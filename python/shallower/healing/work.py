"""A healing in its folder: what is known of it, the training, and what is written."""

import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from ..cutting.in_model import without_layers
from ..errors import ModelError, OutputError, TextsError
from ..evaluation.loss import measure_loss, require_predictable
from ..merging.merge import write_curve, write_merged
from ..merging.merging import trained_logits
from ..models.decoder import Decoder
from ..models.dtypes import computing
from ..models.feed_forward import feed_forward_targets
from ..models.identity import stored_digest
from ..patching.saving import PATCH_FILE
from ..processes import is_main_process
from ..progress import track
from ..storage import write_file
from ..texts.batches import TokenBatches
from ..texts.sequences import Samples, read_samples
from ..values.healing import HEALING_FILE, Healing
from ..values.identity import TextsIdentity
from ..values.loss import Loss
from ..values.plan import Plan
from ..values.recipe import GLOBAL_BATCH, TEACHER_SHARES, Resolved
from ..values.tokens import Tokens
from .checks import require_plan_of
from .distillation import Distillation, Teacher
from .job import describe_job, work_folder
from .loaded_models import LoadedOnce, Uncut
from .measured import MeasuredLosses
from .patched import PATCHED, copy_to, settle
from .ranks import agree, together
from .saving import write_adapters
from .training import Trained, add_adapters, train

TRAINING = "training"
_LOSSES = "losses.json"


@dataclass
class Work:
    """A healing in progress.

    Of all models it holds one at a time on a device, but for a student and its teacher.

    Attributes:
        cut: the cut, a folder or hub id.
        plan: its plan.
        recipe: the settings.
        texts: texts to train on.
        held_out: held-out texts, if there are any.
        uncut: the uncut model, if it is known.
        merge: fold the adapters into the cut.
        losses: the losses of the uncut model and of the cut that are known already.
        progress: whether to show bars; by default if standard error is a terminal.
        trust_remote_code: run code that comes with the models.
        patched: the folder of the patched cut that the healing starts from, if it does.
        automatic: names of the settings that may be changed where memory is short.
    """

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
    automatic: Collection[str]

    @property
    def path(self) -> str:
        """The model that is trained."""
        return str(self.patched or self.cut)

    def to(self, out: Path, overwrite: bool) -> Healing:
        """Heal into a folder.

        Of several processes all train, and the main one writes.

        Args:
            out: a folder that does not exist yet, or is empty.
            overwrite: replace what is there, once the new folder is complete.

        Returns:
            The record; in processes that do not write, as it was before that.

        Raises:
            ShallowerError: as :func:`shallower.heal`.
        """
        cut = LoadedOnce(self.path, trust_remote_code=self.trust_remote_code)
        with ExitStack() as stack:
            with together():
                self.recipe = agree(lambda: self.recipe)  # each saw the memory of its own device
                of_uncut = self._measure_at_once()
                healing, samples = self._prepare(cut)
                tokenizer = cut.load(self.recipe.dtype)[1]
                job = self._job(healing, tokenizer)
                folder = stack.enter_context(work_folder(out, job, overwrite=overwrite))
                done = agree(lambda: _finished(folder))
                if done is not None:
                    return done  # all that was left to do was to rename the folder
                known = MeasuredLosses(folder / _LOSSES, self._given())
                for name, loss in of_uncut.items():
                    known.keep(name, loss)
                if self.held_out:
                    healing = self._with_losses_of_uncut(healing, known, cut)
                adapted, trained = self._train(cut, samples, healing.recipe, known, folder, out)
            healing = replace(
                healing,
                recipe=trained.recipe,
                steps=trained.steps,
                held_out=trained.held_out,
                best_step=trained.best_step,
                tokens_per_second=trained.tokens_per_second,
            )
            if not _is_better(healing):
                healing = self._without_training(healing)
            if is_main_process():
                logits = None
                if self.merge and healing.best_step and healing.recipe.dtype in ("nf4", "int8"):
                    logits = trained_logits(
                        adapted, tokenizer, healing.recipe, checkpoint=trained.checkpoint
                    )
                del adapted
                cut.release()  # what is merged and measured now needs the memory
                healing = self._write(folder, trained, healing, tokenizer, logits)
        return healing

    def _prepare(self, cut: LoadedOnce) -> tuple[Healing, Samples]:
        """The record as far as it is known before any work, and the sequences to train on."""
        model, tokenizer = cut.load(self.recipe.dtype)
        decoder = Decoder.of(model)
        require_plan_of(decoder, self.plan, self.path)
        if self.held_out is not None:
            require_predictable(tokenizer, self.held_out, self.recipe.max_length)
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
        return healing, samples

    def _train(
        self,
        cut: LoadedOnce,
        samples: Samples,
        recipe: Resolved,
        known: MeasuredLosses,
        folder: Path,
        out: Path,
    ) -> tuple[Any, Trained]:
        """The cut with its trained adapters, and how they were trained; no teacher stays."""
        model, tokenizer = cut.load(recipe.dtype)
        decoder = Decoder.of(model)
        distillation = teacher = None
        if self.uncut is not None and recipe.has_teacher:
            whole, _ = self.uncut.load(recipe.dtype)
            if recipe.distill:
                distillation = Distillation(model, whole, self.plan)
            if share := TEACHER_SHARES.get(recipe.objective):
                teacher = Teacher(whole, share)
        targets = feed_forward_targets(model, recipe.attention)
        adapted = add_adapters(model, targets, recipe, base=self._base(out))

        def measure() -> Loss:
            with computing(recipe, decoder.device):
                return self._loss(decoder, tokenizer, "loss, held out")

        def loss(step: int) -> Loss:
            return measure() if step else known.get("before", measure)

        with track("heal", recipe.steps, self._show_progress) as advance:
            trained = train(
                adapted, samples, recipe, folder=folder / TRAINING,
                held_out=loss if self.held_out else None, advance=advance,
                distillation=distillation, teacher=teacher, automatic=self.automatic,
            )  # fmt: skip
        if self.uncut is not None:
            self.uncut.release()
        return adapted, trained

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

    def _measure_at_once(self) -> dict[str, Loss]:
        """The losses of an uncut model that is in memory for its patch, before it leaves."""
        if self.uncut is None:
            return {}
        losses = {}
        if self.held_out and self.uncut.is_loaded(self.recipe.dtype):
            if self.patched is not None and "cut" not in self._given():
                losses["cut"] = self._measure_unpatched()
            if self._original not in self._given():
                losses[self._original] = self._measure_uncut()
        if not self.recipe.has_teacher:
            self.uncut.release()
        return losses

    def _with_losses_of_uncut(
        self, healing: Healing, known: MeasuredLosses, cut: LoadedOnce
    ) -> Healing:
        """The record with the losses of the uncut model, and of the cut before its patch."""

        def instead_of_cut(measure: Callable[[], Loss]) -> Loss:
            cut.release()
            return measure()

        given = self._given()
        if self.patched is not None or "cut" in given:
            unpatched = partial(instead_of_cut, self._measure_unpatched)
            healing = replace(healing, cut=known.get("cut", unpatched))
        if self.uncut is not None or self._original in given:
            uncut = partial(instead_of_cut, self._measure_uncut)
            healing = replace(healing, original=known.get(self._original, uncut))
        if self.uncut is not None and not self.recipe.has_teacher:
            self.uncut.release()
        return healing

    def _measure_uncut(self) -> Loss:
        assert self.uncut is not None
        model, tokenizer = self.uncut.load(self.recipe.dtype)
        return self._loss(Decoder.of(model), tokenizer, "loss, uncut")

    def _measure_unpatched(self) -> Loss:
        assert self.uncut is not None
        model, tokenizer = self.uncut.load(self.recipe.dtype)
        decoder = Decoder.of(model)
        with without_layers(model, self.plan.blocks), computing(self.recipe, decoder.device):
            return self._loss(decoder, tokenizer, "loss, unpatched")

    def _loss(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        description: str,
    ) -> Loss:
        """The held-out loss, shared among the processes."""
        return measure_loss(
            decoder, tokenizer, self.held_out or [],
            tokens=Tokens(self.recipe.max_length, self.recipe.batch_size),
            progress=self._show_progress, description=description, shared=True,
        )  # fmt: skip

    def _job(self, healing: Healing, tokenizer: PreTrainedTokenizerBase) -> str:
        evaluated = None if self.held_out is None else self._identity(tokenizer, self.held_out)
        return describe_job(healing, evaluated, merge=self.merge)

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
        tokenizer: PreTrainedTokenizerBase,
        logits: torch.Tensor | None,
    ) -> Healing:
        """Write everything that ``out`` holds; the record comes last, then the training goes."""
        try:
            if self.patched is not None and healing.best_step == 0:
                copy_to(self.patched, folder)
            elif self.merge:
                healing = write_merged(
                    folder, self.path, trained.checkpoint, healing=healing, held_out=self.held_out,
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
            write_curve(folder, healing)
            (folder / _LOSSES).unlink(missing_ok=True)
            write_file(folder / HEALING_FILE, healing.to_bytes())
            shutil.rmtree(folder.parent / "done", ignore_errors=True)
            (folder / TRAINING).rename(folder.parent / "done")
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write the healed model: {error}") from error
        return healing


def _finished(folder: Path) -> Healing | None:
    """The record of a healing that is written whole."""
    is_whole = (folder / HEALING_FILE).is_file() and not (folder / TRAINING).exists()
    return Healing.load(folder) if is_whole else None


def _is_better(healing: Healing) -> bool:
    """True if the held-out loss fell, or was not measured."""
    before, after = healing.before, healing.after
    return not (before and after and after.nats >= before.nats)
