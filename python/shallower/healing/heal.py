"""The healing of a cut, from its folder to the adapters or the merged model."""

import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from ..cutting.in_model import without_layers
from ..errors import ModelError, OutputError, RecipeError, TextsError, why
from ..evaluation.batches import Stores, UnsavedResults, unkept
from ..evaluation.loss import measure_loss, require_predictable
from ..memory.device import free_memory
from ..merging.merge import write_curve, write_merged
from ..merging.merging import Merging, stored_plainly, trained_logits
from ..models.architecture import text_config
from ..models.decoder import Decoder
from ..models.dtypes import QUANTISED, computing
from ..models.feed_forward import feed_forward_targets
from ..models.head import Head
from ..models.identity import stored_digest
from ..models.source import ModelSource
from ..processes import is_main_process
from ..progress import say_goes_on
from ..results.healing import Healing
from ..results.loss import Loss
from ..results.speech import Answer
from ..settings.recipe import GLOBAL_BATCH, Recipe, Resolved
from ..storage import check_apart, check_free, write_file
from ..texts.batches import TokenBatches
from ..texts.sequences import ReadOnce, Samples, check_answers, read_samples, usable_answers
from ..texts.sources import place_of_texts
from ..texts.splits import refuse_shared
from ..values.counts import counted
from ..values.files import HEALING_FILE
from ..values.identity import TextsIdentity
from ..values.tokens import Tokens
from .bar import steps_bar
from .checks import (
    check_disk,
    check_original,
    require_one_process,
    require_peft,
    require_plan_of,
    resolve,
)
from .folders import last_step, of_step, plan_of_cut
from .job import (
    LOSSES,
    TRAINING,
    HealingJob,
    LoadedOnce,
    copy_patched,
    describe_job,
    finished,
    keep_loss,
    kept_losses,
    move_patched,
    patched_cut,
    work_folder,
    write_adapters,
)
from .ranks import agree, together
from .training import Training, add_adapters, train


def heal(
    path: str | Path,
    texts: Iterable[str],
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    answers: Sequence[Answer] | None = None,
    eval_texts: Iterable[str] | None = None,
    original: str | Path | None = None,
    merge: bool = False,
    from_patch: bool = False,
    losses: tuple[Loss | None, Loss | None] = (None, None),
    overwrite: bool = False,
    progress: bool | None = None,
    trust_remote_code: bool = False,
    stores: Stores = unkept,
) -> Healing:
    """Heal a cut by training low-rank adapters, as the paper does (2403.17887, appendix A).

    Leaves in ``out`` the adapters, or with ``merge`` a standard checkpoint; ``healing.json`` and,
    with matplotlib, ``healing.png``; the plan and a model card. A killed run goes on when it is
    called again with the same arguments, from its last complete checkpoint.

    Args:
        path: the cut: a folder or hub id with a plan beside the weights.
        texts: texts to train on, read once, and only as many as the steps take; none are needed
            for answers alone.
        out: a folder that does not exist yet, or is empty.
        recipe: the settings; by default those of the paper where it healed this model, else
            ours.
        answers: answers of the uncut model to train on beside the texts, from
            :func:`shallower.answer_prompts`; the recipe's ``share`` of the sequences of every step.
            Only the tokens of an answer are predicted, not its prompt. Those without a token, or
            behind a prompt that fills a sequence, are left out with a warning.
        eval_texts: held-out texts; the adapters of the least loss on them are kept.
        original: the uncut model: its held-out loss is measured, and it teaches if the recipe
            compares with it.
        merge: fold the adapters into the unquantised weights of the cut.
        from_patch: patch the cut in closed form first, by :func:`shallower.patch` of ``original``
            on ``texts``, and train on from there. Adapters that are not merged need the patched
            cut, which lies beside them. If no step of the training is better than the patch,
            ``out`` is the patched cut, with a warning.
        losses: the losses of the uncut model and of the cut before a patch, if they are known, so
            that they are not measured again; in nats a token on ``eval_texts`` at the recipe's
            ``max_length``.
        overwrite: replace an earlier output at ``out``, once the new folder is complete.
        progress: whether to show bars with ETA on standard error; by default if that is a
            terminal.
        trust_remote_code: run code that comes with the models.
        stores: gives the cached results of a model; by default nothing is cached.

    Returns:
        The record that is in ``healing.json``.

    Raises:
        PlanError: the model was not cut, or not out of ``original``.
        RecipeError: settings that do not fit.
        TextsError: too few texts, no answer that can be trained on, or no text that is held out.
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
    check_apart(out, [path, original, place_of_texts(texts), place_of_texts(eval_texts)])
    check_free(out, overwrite)
    recipe.check(original=original is not None, from_patch=from_patch)
    if eval_texts is None and losses != (None, None):
        raise RecipeError("losses without eval_texts: give the texts that they were measured on")
    held_out = None if eval_texts is None else list(eval_texts)
    refuse_shared(texts, held_out)
    source = ReadOnce(texts)
    alone = answers is not None and recipe.share == 1 and not from_patch
    if not alone and not any(True for _ in source):
        raise TextsError("there are no texts to heal with" + _instead_of_texts(answers, from_patch))
    plan = plan_of_cut(path)
    if original is not None:
        check_original(str(original), plan, trust_remote_code)
    cut = ModelSource(path, trust_remote_code=trust_remote_code)
    writes = {"merge": merge, "from_patch": from_patch}
    check_disk(out, cut, plan, recipe=recipe, answers=answers is not None, **writes)
    free_memory()  # so that what is planned with is what there is, after a run's scan too
    source_model = None
    if original is not None:
        source_model = LoadedOnce(replace(cut, path=str(original)), plan, progress)
    resolved = resolve(
        path,
        plan,
        recipe,
        trust_remote_code=trust_remote_code,
        answers=answers is not None,
    )
    job = HealingJob(
        cut=path,
        plan=plan,
        recipe=resolved,
        texts=source,
        answers=[] if answers is None else usable_answers(answers, resolved.max_length),
        held_out=held_out,
        original=source_model,
        merge=merge,
        losses=losses,
        stores=stores,
        progress=progress,
        trust_remote_code=trust_remote_code,
        # What the user left to us, and what changes nothing but rounding.
        adjustable={name for name in ("batch_size", "recompute") if getattr(recipe, name) is None},
    )
    dtype = stored_plainly(path, trust_remote_code) if merge or from_patch else ""
    if from_patch:
        require_one_process()
        job = replace(job, patched=patched_cut(job, out, dtype))
    done = _Healer(job, kept := UnsavedResults()).heal(out, overwrite)
    if done.merge is not None:
        kept.keep(stores, replace(cut, path=out), done.merge.dtype)
    if job.patched is not None:
        shutil.rmtree(job.patched, ignore_errors=True)
        if done.best_step == 0:
            warnings.warn(
                f"no step of the training was better than the patch: {out} is the patched cut, "
                f"and nothing was trained. Lower the learning rate (learning_rate, "
                f"--learning-rate), or give more texts",
                stacklevel=2,
            )
    return done


def _instead_of_texts(answers: Sequence[Answer] | None, from_patch: bool) -> str:
    """What else there is to do where there are no texts, beside giving some."""
    if answers is None:
        return ""
    if from_patch:
        return ": a patch is fitted on some (from_patch, --from-patch)"
    return ": give some, or train on answers alone (share=1, --share 1)"


class _Healer:
    """A healing in progress, with one model at a time on a device, or a student and its teacher."""

    def __init__(self, job: HealingJob, kept: UnsavedResults) -> None:
        self._job, self._kept = job, kept
        self._given = job.known_losses()
        self._progress = job.progress if is_main_process() else False
        self._folder: Path

    def heal(self, out: Path, overwrite: bool) -> Healing:
        """Heal into a folder: all processes train, and the main one writes and has the record."""
        job = self._job
        source = ModelSource(job.model, trust_remote_code=job.trust_remote_code)
        cut = LoadedOnce(source, progress=job.progress)
        with ExitStack() as stack:
            with together():
                # each saw the memory of its own device
                job = self._job = replace(job, recipe=agree(lambda: job.recipe))
                of_original = self._measure_at_once()
                healing, samples = self._prepare(cut)
                tokenizer = cut.load(job.recipe.dtype)[1]
                described = self._describe(healing, tokenizer)
                opened = work_folder(out, described, overwrite=overwrite)
                self._folder = stack.enter_context(opened)
                done = agree(lambda: finished(self._folder))
                if done is not None:
                    return done  # all that was left to do was to rename the folder
                for name, loss in of_original.items():
                    self._keep(name, loss)
                if job.held_out:
                    healing = self._with_losses_of_original(healing, cut)
                adapted, trained = self._train(cut, samples, healing.recipe, out)
            healing = replace(healing, **trained)
            if not _is_better(healing):
                healing = self._without_training(healing)
            if is_main_process():
                logits = None
                if job.merge and healing.best_step and healing.recipe.dtype in QUANTISED:
                    logits = trained_logits(
                        adapted, tokenizer, healing.recipe, checkpoint=self._checkpoint(healing)
                    )
                del adapted
                cut.release()  # what is merged and measured now needs the memory
                healing = self._write(healing, tokenizer, logits)
        return healing

    def _keep(self, name: str, loss: Loss) -> Loss:
        """Keep a loss, and give it as the main process measured it."""
        return agree(lambda: keep_loss(self._folder, name, loss))

    def _known(self, name: str, measure: Callable[[], Loss]) -> Loss:
        """Look a loss up, or measure it and keep it; all processes do so in one order."""
        found = self._given.get(name) or agree(lambda: kept_losses(self._folder).get(name))
        return found or self._keep(name, measure())

    def _checkpoint(self, healing: Healing) -> Path:
        """The folder of the adapters that are kept."""
        return of_step(self._folder / TRAINING, healing.best_step)

    def _prepare(self, cut: LoadedOnce) -> tuple[Healing, Samples]:
        """The record as far as it is known before any work, and the sequences to train on."""
        job, recipe = self._job, self._job.recipe
        model, tokenizer = cut.load(recipe.dtype)
        decoder = Decoder.of(model)
        require_plan_of(decoder, job.plan, job.model)
        if job.held_out is not None:
            require_predictable(tokenizer, job.held_out, recipe.max_length)
        samples = read_samples(
            tokenizer,
            job.texts.last_pass(),
            max_length=recipe.max_length,
            packing=recipe.packing,
            num_samples=recipe.steps * GLOBAL_BATCH,
            answers=job.answers,
            share=recipe.share,
        )
        check_answers(job.answers, text_config(model).vocab_size)
        targets = feed_forward_targets(model, recipe.attention)
        healing = Healing(
            model=decoder.identity,
            weights=stored_digest(job.model),
            plan=job.plan,
            recipe=recipe.without_dropout() if targets.parameters else recipe,
            adapted=len(targets),
            texts=samples.identity,
            steps=(),
            held_out={},
            best_step=0,
            answers=samples.answers,
        )
        return healing, samples

    def _train(
        self,
        cut: LoadedOnce,
        samples: Samples,
        recipe: Resolved,
        out: Path,
    ) -> tuple[Any, dict[str, Any]]:
        """The cut with its trained adapters, and how they were trained; no teacher stays."""
        job = self._job
        model, tokenizer = cut.load(recipe.dtype)
        decoder = Decoder.of(model)
        teacher = None
        if job.original is not None and recipe.has_teacher:
            teacher = Head.of(Decoder.of(job.original.load(recipe.dtype)[0]))
        targets = feed_forward_targets(model, recipe.attention)

        def measure() -> Loss:
            with computing(recipe, decoder.device):
                return self._loss(decoder, tokenizer, "loss, held out")

        def loss(step: int) -> Loss:
            return measure() if step else self._known("before", measure)

        training = Training(
            model=add_adapters(model, targets, recipe, base=job.base(out)),
            samples=samples,
            recipe=recipe,
            folder=self._folder / TRAINING,
            held_out=loss if job.held_out else None,
            teacher=teacher,
        )
        if taken := last_step(training.folder):
            say_goes_on(f"{taken:,} of {recipe.steps:,} steps were taken", self._progress)
        with steps_bar(recipe.steps, self._progress) as reach:
            trained = train(training, reach, job.adjustable)
        if job.original is not None:
            job.original.release()
        return training.model, trained

    def _measure_at_once(self) -> dict[str, Loss]:
        """The losses of an uncut model that is in memory for its patch, before it leaves."""
        job, losses = self._job, {}
        if job.original is None:
            return {}
        if job.held_out and job.original.is_loaded(job.recipe.dtype):
            if job.patched is not None and "cut" not in self._given:
                losses["cut"] = self._measure_unpatched()
            if job.original_key not in self._given:
                losses[job.original_key] = self._measure_original()
        if not job.recipe.has_teacher:
            job.original.release()
        return losses

    def _with_losses_of_original(self, healing: Healing, cut: LoadedOnce) -> Healing:
        """The record with the losses of the uncut model, and of the cut before its patch."""
        job = self._job

        def instead_of_cut(measure: Callable[[], Loss]) -> Loss:
            cut.release()
            return measure()

        if job.patched is not None or "cut" in self._given:
            unpatched = partial(instead_of_cut, self._measure_unpatched)
            healing = replace(healing, cut=self._known("cut", unpatched))
        if job.original is not None or job.original_key in self._given:
            whole = partial(instead_of_cut, self._measure_original)
            healing = replace(healing, original=self._known(job.original_key, whole))
        if job.original is not None and not job.recipe.has_teacher:
            job.original.release()
        return healing

    def _measure_original(self) -> Loss:
        assert self._job.original is not None
        model, tokenizer = self._job.original.load(self._job.recipe.dtype)
        store = self._job.original_store
        return self._loss(Decoder.of(model), tokenizer, "loss, uncut", store=store)

    def _measure_unpatched(self) -> Loss:
        job = self._job
        assert job.original is not None
        model, tokenizer = job.original.load(job.recipe.dtype)
        decoder = Decoder.of(model)
        with without_layers(model, job.plan), computing(job.recipe, decoder.device):
            how: Any = {"plan": job.plan, "store": job.original_store}
            return self._loss(decoder, tokenizer, "loss, unpatched", **how)

    def _loss(self, decoder: Decoder, tokenizer: Any, description: str, **of: Any) -> Loss:
        """The held-out loss, shared among the processes; ``of`` is for :func:`measure_loss`."""
        recipe = self._job.recipe
        return measure_loss(
            decoder,
            tokenizer,
            self._job.held_out or [],
            tokens=Tokens(recipe.max_length, recipe.batch_size),
            progress=self._progress,
            description=description,
            shared=True,
            **of,
        )

    def _describe(self, healing: Healing, tokenizer: PreTrainedTokenizerBase) -> str:
        job = self._job
        evaluated = None if job.held_out is None else self._identity(tokenizer, job.held_out)
        return describe_job(healing, evaluated, merge=job.merge)

    def _identity(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> TextsIdentity:
        """The identity of the held-out texts, on which the losses that are given must be."""
        length = self._job.recipe.max_length
        batches = TokenBatches(tokenizer, texts, Tokens(length, 64), min_tokens=2)
        num_tokens = sum(int(batch.attention_mask.sum()) - len(batch) for batch in batches)
        for loss in filter(None, self._job.losses):
            if loss.num_tokens != num_tokens:
                raise TextsError(
                    f"losses were measured on {counted(loss.num_tokens, 'token')}, and "
                    f"eval_texts have {num_tokens} of at most {length} a text: measure them with "
                    f"max_length={length}, or leave them out"
                )
        return batches.identity

    def _without_training(self, healing: Healing) -> Healing:
        """The record where no step was better than the start: the patch is kept, if it began so."""
        if self._job.patched is not None:
            return replace(healing, best_step=0)
        raise ModelError(
            f"healing made it worse: the held-out loss was {healing.before} before it, and "
            f"{healing.after} at its best, step {healing.best_step}; nothing is saved. Lower the "
            f"learning rate (learning_rate, --learning-rate), or give more texts"
        )

    def _write(
        self,
        healing: Healing,
        tokenizer: PreTrainedTokenizerBase,
        logits: torch.Tensor | None,
    ) -> Healing:
        """Write everything that ``out`` holds; the record comes last, then the training goes."""
        job, folder, checkpoint = self._job, self._folder, self._checkpoint(healing)
        try:
            if job.patched is not None and healing.best_step == 0:
                copy_patched(job.patched, folder)
            elif job.merge:
                merging = Merging(
                    job.model,
                    checkpoint,
                    healing,
                    held_out=job.held_out,
                    trained=logits,
                    progress=self._progress,
                    trust_remote_code=job.trust_remote_code,
                    kept=self._kept,
                )
                healing = write_merged(folder, merging)
            else:
                base = str(move_patched(job.patched, folder)) if job.patched else job.cut
                write_adapters(
                    folder,
                    base,
                    checkpoint,
                    healing=healing,
                    tokenizer=tokenizer,
                    trust_remote_code=job.trust_remote_code,
                )
            write_curve(folder, healing)
            (folder / LOSSES).unlink(missing_ok=True)
            write_file(folder / HEALING_FILE, healing.to_bytes())
            shutil.rmtree(folder.parent / "done", ignore_errors=True)
            (folder / TRAINING).rename(folder.parent / "done")
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write the healed model: {why(error)}") from error
        return healing


def _is_better(healing: Healing) -> bool:
    """True if the held-out loss fell, or was not measured."""
    before, after = healing.before, healing.after
    return not (before and after and after.nats >= before.nats)
