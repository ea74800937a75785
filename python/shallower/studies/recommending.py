"""Recommending: the stages of a run on one model that is loaded, from its scan to a checkpoint."""

import json
import math
import shlex
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.checkpoint_files import stored_bytes
from ..cutting.in_model import without_layers
from ..cutting.saving import save_cut, verify_checkpoint
from ..errors import ModelError, PatchError, PlanError, TextsError
from ..evaluation.loss import nats_of
from ..evaluation.speech import Spoken
from ..forecasts.gain import GAIN_DEVICE, gain
from ..judgement.choosing_size import SizeChoice
from ..judgement.held_out_cuts import out_of_domain
from ..judgement.judges.judge import LossJudge
from ..models.decoder import Decoder
from ..models.source import place_of
from ..patching.patch import patch_tokens, with_patch
from ..patching.saving import save_patched
from ..progress import stage, track
from ..reporting.results import Run, weights_mark
from ..results.patch import Patch
from ..results.recommendation import Recommended
from ..results.scores import Difference, Scores
from ..results.speech import Answer
from ..savings.timing import own_device
from ..scanning.model import stored_scan
from ..scanning.scan import Scan
from ..settings.stages import ScanSettings
from ..settings.studies import RunSettings
from ..storage import write_file
from ..values.entries import ResultStore
from ..values.files import (
    CHECKPOINT_FOLDER,
    GAIN_FILE,
    PARTIAL_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    SCAN_FILE,
)
from ..values.plan import Plan
from .answers import WantedAnswers
from .measuring import Measuring
from .speaking import SpeechOnPrompts
from .study import Study, model_words

SCAN_TEXTS = 256
"""Texts by which layers are compared, at most; distances need fewer than losses."""

PATCHING_FOLDER = ".patching"
"""What a patch goes on from that was cut short, or found no room for its checkpoint."""


class Recommending:
    """A run on one loaded model, which is restored afterwards.

    The checkpoint is cut from ``gguf`` if that is there, and else saved from memory.
    TextsError for no test text of two tokens or a long prompt, ModelError where layers do not run
    one by one or given prompts cannot be answered.
    """

    def __init__(
        self,
        study: Study[RunSettings],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: ResultStore,
        answers: WantedAnswers | None = None,
        *,
        gguf: Path | None = None,
    ) -> None:
        self._study, self._settings, self._out = study, study.settings, study.folder
        self._model, self._tokenizer, self._target = model, tokenizer, study.settings.target
        self._store, self._wanted_answers, self._gguf = store, answers, gguf
        with track("tokenise the texts", show=study.progress):
            self._measuring = measuring = Measuring(study, model, tokenizer, store=store)
            self._decoder, self._plans = measuring.decoder, measuring.plans(lambda: self._scan)
        if answers is not None and not self._settings.heal:
            most = patch_tokens(measuring.num_parameters, on_cpu=self._on_cpu)
            fitted = sum(len(text.ids) for text in measuring.split.fit)
            answers = self._wanted_answers = answers.within(min(most, fitted))
        how: Any = {"tokenizer": tokenizer, "tokens": self._settings.tokens}
        self._outside: Any = partial(out_of_domain, progress=study.progress, **how)
        if answers is not None:
            answers.check(self._decoder, tokenizer, self._fitted)

    def run(self, earlier: Run | None = None) -> Run:
        """Do all stages but a healing; ``results.json`` is written before each next step.

        ``earlier`` are the results of the same job, as far as it came when it was cut short.
        """
        self._plans.require_possible(self._target)
        if earlier is not None:
            self._scan = earlier.scan
        results = self._begun()
        if earlier is None:
            results.save()
        (self._out / PARTIAL_FILE).unlink(missing_ok=True)  # only now it is not needed
        try:
            with stage("race cuts"):
                choice = self._plans.choose(self._target)
        except PlanError:
            self._withdraw()
            raise
        if earlier is not None and self._is_intact(earlier):
            results = earlier
        else:
            if self._target.max_loss is None or self._settings.plan_only:
                found = self._recommended(results, choice)
                assert found is not None
            else:
                found = self._within(results, choice)
            results = found
            results.save()
        return results

    def _withdraw(self) -> None:
        """Take back what was written: no cut reaches the target, another one may follow."""
        for name in (PLAN_FILE, GAIN_FILE, RESULTS_FILE, SCAN_FILE):
            (self._out / name).unlink(missing_ok=True)

    def _begun(self) -> Run:
        """The results when nothing but the scan is known."""
        study, split = self._study, self._study.split
        with stage("measure the whole model"):
            whole = self._measuring.whole()
        with stage("scan"):
            _ = self._scan
        texts = {"fit": len(split.fit), "choose": len(split.choose), "report": whole.num_texts}
        kinds = {"plan_only": self._settings.plan_only, "gguf": self._gguf}
        marks = {"job": study.job, **{name: "yes" for name, is_so in kinds.items() if is_so}}
        place = place_of(self._model)
        size = None if place is None else stored_bytes(place)
        return Run(
            self._out,
            self._target,
            self._scan,
            whole,
            texts,
            command=study.again,
            loaded=shlex.join(model_words(study.model)),
            evaluated=study.again_by_eval,
            source=(place.name, size) if place and size else None,
            marks=marks,
        )

    def _is_intact(self, earlier: Run) -> bool:
        """Whether the recommended cut of an earlier run of this job is where it was saved."""
        if self._settings.plan_only:
            return earlier.recommended is not None
        mark = earlier.marks.get("checkpoint")
        return mark is not None and mark == weights_mark(self._out / CHECKPOINT_FOLDER)

    @cached_property
    def _scan(self) -> Scan:
        """The comparison of all layers, as it lies in the folder."""
        measuring = self._measuring
        settings = ScanSettings(
            max_length=measuring.tokens.max_length,
            batch_size=measuring.tokens.batch_size,
            threads=self._settings.threads,
            keep_samples=True,
        )
        scanned = stored_scan(
            self._decoder,
            self._tokenizer,
            measuring.split.fit[:SCAN_TEXTS],
            settings=settings,
            store=self._store,
            checkpoint=self._out / PARTIAL_FILE,
            progress=self._study.progress,
        )
        scanned.save(self._out / SCAN_FILE)
        return scanned

    def _within(self, results: Run, choice: SizeChoice) -> Run:
        """The most layers whose patched cut loses no more than the target allows, saved.

        A quick patch leaves more of the loss than the one that is saved: so larger sizes are tried
        if their losses, less by as much as that of ``choice`` was, fit.
        """
        n = choice.n
        while (found := self._recommended(results, replace(choice, n=n))) is None:
            if n == 1:
                self._withdraw()
                raise PlanError(
                    f"no cut loses at most {self._target.max_loss:g} nats a token: the best "
                    f"of a single layer loses {self._kept}, as it is saved, on the selection "
                    f"texts; ask for more (max_loss, --max-loss)"
                )
            n -= 1
        larger = self._larger(n)
        for size in range(larger, n, -1):
            deeper = self._recommended(results, replace(choice, n=size))
            if deeper is not None:
                return deeper
        if larger > n:  # what was saved is still there
            self._write_plan(self._plans.verify(n).plan)
        return found

    def _larger(self, n: int) -> int:
        """The most layers that should lose no more than the target allows, after a patch."""
        most = self._target.max_loss
        assert most is not None
        quick = self._plans.lost(n).mean
        share = min(1.0, max(0.0, self._kept.mean / quick)) if quick > 0 else 1.0
        while n + 1 < len(self._decoder) and share * self._plans.lost(n + 1).mean <= most:
            n += 1
        return n

    def _recommended(self, results: Run, choice: SizeChoice) -> Run | None:
        """Patch the verified plan of a size and save it; None if it loses more than allowed."""
        with stage(f"race cuts of {choice.n}", "race cuts"):
            verified, measuring = self._plans.verify(choice.n), self._measuring
        plan = verified.plan
        self._write_plan(plan)
        with stage("measure the cut"):
            cut, worse = measuring.loss_of_cut(plan), None
            block = self._scan.best_block(choice.n)
            if set(block.layers) != set(plan.dropped):
                worse = measuring.loss_of_cut(measuring.plan(block.layers)).minus(cut)
            outside = self._outside({}, "whole", self._model, store=self._store)
            with without_layers(self._model, plan.blocks):
                outside = self._outside(outside, "cut", self._model, store=self._store, plan=plan)
        recommended = Recommended(
            verified,
            choice.reason,
            results.whole,
            cut,
            patched=None,
            healed=None,
            by_distance=worse,
            layers_share=choice.n / len(self._decoder),
            parameters_share=measuring.parameters_share(plan),
            max_loss=self._target.max_loss,
            out_of_domain=outside,
        )
        results = replace(results, recommended=recommended)
        if not self._settings.plan_only:
            results.save()
        with stage("speech of the whole model"):
            speech = self.speech
            self._measuring.speech_of_whole  # noqa: B018 - kept, before the model is changed
        if self._settings.plan_only:
            return self._with_speech(results, plan, None)
        if not self._settings.patch:
            return self._saved_bare(results, plan)
        with stage("answers to learn from"):
            answers = self.answers or ()  # likewise, and refused if they cannot be
        kept = self._out / PATCHING_FOLDER
        try:
            with ExitStack() as stack:
                with stage("patch"):
                    patching = with_patch(
                        self._model,
                        self._tokenizer,
                        plan,
                        texts=self._measuring.split.fit,
                        answers=answers,
                        share=self._settings.share,
                        max_length=self._measuring.tokens.max_length,
                        progress=self._study.progress,
                        num_tokens=patch_tokens(measuring.num_parameters, on_cpu=self._on_cpu),
                        checkpoint=kept,
                    )
                    done = stack.enter_context(patching)
                found = self._saved(results, plan, done)
                shutil.rmtree(kept, ignore_errors=True)
                patched = None
                if found is not None and speech is not None:
                    with stage("speech of the patched model", "speech of the cut"):
                        patched = speech.compare(Decoder.of(self._model), "patched")
            return self._with_speech(found, plan, patched)
        except (PatchError, TextsError) as error:
            why = f"the cut is not patched: {error}"
            warnings.warn(why, stacklevel=2)
            shutil.rmtree(kept, ignore_errors=True)
        recommended = replace(recommended, unpatched=why)
        return self._saved_bare(replace(results, recommended=recommended), plan)

    def _saved_bare(self, results: Run, plan: Plan) -> Run | None:
        """Save the cut as it is."""
        with without_layers(self._model, plan.blocks):
            found = self._saved(results, plan, None)
        return self._with_speech(found, plan, None)

    @cached_property
    def answers(self) -> Sequence[Answer] | None:
        """What the whole model says, to patch and to train on; None where that is not asked for."""
        if self._wanted_answers is None:
            return None
        return self._wanted_answers.by(
            self._decoder,
            self._tokenizer,
            self._fitted,
            store=self._store,
            progress=self._study.progress,
        )

    @property
    def _on_cpu(self) -> bool:
        return self._decoder.device.type == "cpu"

    @property
    def _fitted(self) -> list[str]:
        """The calibration texts."""
        return [text.text for text in self._measuring.split.fit]

    @property
    def speech(self) -> SpeechOnPrompts | None:
        """How the whole model speaks; None where no speech is measured."""
        return self._measuring.speech

    def _with_speech(self, results: Run | None, plan: Plan, patched: Spoken | None) -> Run | None:
        """Add how the models speak: the whole one, the bare cut and the patched one."""
        speech, whole = self.speech, self._measuring.speech_of_whole
        if results is None or speech is None or whole is None:
            return results
        decoder = self._decoder
        with stage("speech of the cut"):
            with without_layers(self._model, plan.blocks):
                cut = speech.compare(Decoder.of(self._model), "cut")
            said = {"cut": cut} if patched is None else {"cut": cut, "patched": patched}
            judged = {name: speech.complete(one, decoder) for name, one in said.items()}
        key = speech.key(self._study.store)
        speech.keep(self._store, key, judged["cut"], plan=plan, model=decoder.identity)
        measured = {"whole": whole, **judged}
        return replace(results, speech=measured, continuations=speech.samples(said))

    def _write_plan(self, plan: Plan) -> None:
        """Write the plan, and what its cut saves where its config can tell, for the page."""
        plan.save(self._out / PLAN_FILE)
        place, target = self._out / GAIN_FILE, self._target
        device = GAIN_DEVICE if target.latency is None else target.device or own_device().name
        in_context = target.latency is not None or target.memory is not None
        context = target.context if in_context else None
        try:
            found = gain(self._model, plan, device=device, context=context)
        except ModelError:
            place.unlink(missing_ok=True)
            return
        write_file(place, (json.dumps(found.to_json(), indent=1) + "\n").encode())

    def _saved(self, results: Run, plan: Plan, done: Patch | None) -> Run | None:
        """Save the model as it is now, and reload it; None if it loses more than allowed."""
        with stage("save and compare"):
            most = self._target.max_loss
            if most is not None:
                self._kept = kept = self._lost_now()
                error = kept.stderr if math.isfinite(kept.stderr) else 0.0
                if not kept.mean + error <= most:
                    return None
            return self._saved_now(results, plan, done)

    def _saved_now(self, results: Run, plan: Plan, done: Patch | None) -> Run:
        folder, recommended = self._out / CHECKPOINT_FOLDER, results.recommended
        assert recommended is not None
        outside = recommended.out_of_domain
        losses: Any = results.whole, recommended.cut, *outside.values()
        save: Any = partial(save_cut, plan=plan, gguf=self._gguf)
        if done is not None:
            outside = self._outside(outside, "patched", self._model)
            patched = self._measuring.loss_now(self._model)
            losses = {"whole": results.whole, "cut": recommended.cut, "patched": patched}
            save = partial(save_patched, done=done, out_of_domain=outside)
            recommended = replace(recommended, patched=patched, out_of_domain=outside)
            results = replace(results, recommended=recommended)
        with track("save the model", show=self._study.progress):
            how = {"losses": losses, "tested": self._study.tested, "command": results.command}
            how["text_only"] = self._study.settings.text_only
            save(self._model, self._tokenizer, folder, overwrite=True, **how)
        results.save()
        text, place = max(self._study.split.report, key=len), results.checkpoint
        assert place is not None
        try:
            with track("reload and compare", show=self._study.progress):
                difference = verify_checkpoint(
                    self._model, self._tokenizer, place, layers=None, text=text
                )
        except ModelError as error:
            all_else = self._out / RESULTS_FILE
            raise ModelError(f"{error}; all else is in {all_else}") from error
        if difference == 0:
            self._measuring.keep_loss_of(place, recommended.patched or recommended.cut)
        marks = {**results.marks, "checkpoint": weights_mark(folder)}
        return replace(results, difference=difference, marks=marks)

    def _lost_now(self) -> Difference:
        """Compare the model as it is now with the whole one, on the selection texts."""
        verifier = self._plans.verifier
        judge = verifier.trials.judge
        assert isinstance(judge, LossJudge)
        how: Any = {"description": "loss", "progress": False}
        sums, _ = nats_of(Decoder.of(self._model), judge.batches, **how)
        return Scores(sums, judge.weights).minus(verifier.scores((), after="none"))
