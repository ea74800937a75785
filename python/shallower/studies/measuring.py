"""Measuring: the cuts of one model in their states, on the test texts, each once."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.in_model import without_layers
from ..cutting.saving import save_model
from ..errors import PatchError
from ..evaluation.batches import UnsavedResults, batches_of_texts
from ..evaluation.loss import fitting_tokens
from ..judgement.held_out_cuts import HeldOutCuts
from ..judgement.judges import judge_of
from ..judgement.judges.judge import Judge, LossJudge
from ..judgement.patched_trials import PatchedTrials, stays
from ..judgement.subject import evenly, parameters_share
from ..judgement.trials import AnyCut, Trials
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..models.source import ModelSource
from ..patching.patch import with_patch
from ..patching.quick import QuickPatch
from ..progress import track
from ..results.loss import Loss
from ..results.scores import Scores
from ..results.speech import Answer, Speech
from ..results.task_scores import TaskScores
from ..scanning.scan import Scan
from ..settings.recipe import Recipe
from ..settings.studies import State
from ..store.given_models import ModelStore
from ..texts.batches import AnyTexts, Batch, TokenBatches, TokenisedText, tokenise
from ..texts.prompts import Prompt, prompts_fingerprint
from ..texts.splits import Splits
from ..values.entries import ResultStore, recalled
from ..values.identity import TextsIdentity
from ..values.plan import Gone, Plan, gone_by, key_of
from ..values.provenance import hash_of
from ..values.schema import plain_fields, read
from ..values.tokens import Tokens
from .answers import KeptAnswers
from .measures import ScoresOnTasks
from .speaking import SpeechOnPrompts, speech_of
from .study import Study
from .verified_plans import VERIFYING_TEXTS, VerifiedPlans

HEALING_FOLDER = ".healing"
"""What is being healed below the folder of a study; it is gone when it is measured."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A cut in one of its states: its loss, its scores by task, how it speaks where that is asked
    for, and the wall time they took.
    """

    loss: Loss
    tasks: tuple[TaskScores, ...] = ()
    seconds: float = 0.0
    speech: Speech | None = None

    def to_record(self) -> dict[str, Any]:
        """Give the values from which it can be read again, as JSON has them."""
        return plain_fields(self, "to_record")


@dataclass(frozen=True)
class Calibration:
    """Calibration texts of one name, and the quick patch that is solved on some of them.

    ``fitted`` is a hash of them and of the selection texts; ``batches`` are those of two tokens.
    """

    name: str
    split: Splits[TokenisedText]
    fitted: str
    batches: Sequence[Batch]
    identity: TextsIdentity
    patch: QuickPatch
    patched: PatchedTrials


class Measuring:
    """The measurements of one loaded model of a study; afterwards the model is as before.

    TextsError: no test text has two tokens, or a prompt cannot be answered. ModelError: the layers
    cannot be run one by one; or the model cannot speak, and is to.
    """

    def __init__(
        self,
        study: Study[Any],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        store: ResultStore,
        tasks: ScoresOnTasks | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self._study, self._store, self._recipe = study, store, recipe
        self.model, self.tokenizer = model, tokenizer
        self._tasks = tasks
        self._tasks_key = None if tasks is None else tasks.key(study.store)
        self.decoder = Decoder.of(model)
        self.decoder.identity  # noqa: B018 - as the model is before anything is cut
        self.tokens = fitting_tokens(self.decoder, study.settings.tokens)
        self.texts = self._tokenised()
        self.report = next(iter(self.texts.values())).report
        self.test_set = batches_of_texts(tokenizer, self.report, self.tokens, count_bytes=False)
        self.judge = LossJudge(self.test_set.numbered)
        self.num_rejected = len(self.report) - self.judge.num_items
        self._said: dict[int, list[tuple[Answer, ...]]] = {}
        layerwise = Layerwise(self.decoder)
        if getattr(study.settings, "judge", "loss") != "none":
            layerwise.check(self.judge.batches[0])
        self.held_out = HeldOutCuts(
            layerwise,
            self.judge,
            self.judge if study.judges[1] == "loss" else self._judged_by(1, self.report),
            store=store,
            texts=self.test_set.fingerprint,
            num_rejected=self.num_rejected,
        )
        self._speech = speech_of(study, self.decoder, tokenizer)
        self._measured: dict[tuple[Gone, State, str], Measured] = {}
        self._shares: dict[Gone, float] = {}  # of the seconds of cuts judged together

    def _tokenised(self) -> dict[str, Splits[TokenisedText]]:
        """All texts of the study, tokenised once; the test texts are the same for every name."""
        found: dict[str, Splits[TokenisedText]] = {}

        def tokenised(texts: AnyTexts) -> list[TokenisedText]:
            return list(tokenise(self.tokenizer, texts, self.tokens.max_length))

        for name, split in self._study.splits.items():
            report = next(iter(found.values())).report if found else tokenised(split.report)
            found[name] = Splits(tokenised(split.fit), tokenised(split.choose), report)
        return found

    @property
    def split(self) -> Splits[TokenisedText]:
        """The tokenised texts of a study on one kind of texts."""
        return next(iter(self.texts.values()))

    def choosing(self, texts: Sequence[TokenisedText]) -> Judge:
        """The judge that cuts are chosen by, on the selection texts or items."""
        return self._judged_by(0, texts)

    def _judged_by(self, half: int, texts: Sequence[TokenisedText]) -> Judge:
        """The judge of the selection set or of the test set."""
        name = self._study.judges[half]
        if name != "speech":
            items = self._study.items[half]
            return judge_of(name, self.tokenizer, texts, tokens=self.tokens, items=items)
        said = self._answers(half)
        longest = max(len(one.ids) for answers in said for one in answers)
        tokens = fitting_tokens(self.decoder, Tokens(longest, self._study.settings.batch_size))
        return judge_of(name, self.tokenizer, texts, tokens=tokens, items=said)

    def _answers(self, half: int) -> list[tuple[Answer, ...]]:
        """What the whole model says to each selection prompt, or each test prompt; once."""
        if half not in self._said:
            prompts = cast(Sequence[Prompt], self._study.items[half])
            speaking = SpeechOnPrompts.of_study(self._study, prompts).speaking(self.tokenizer)
            write = KeptAnswers(self._store).write
            with track("generate, whole model", speaking.most_tokens, self._study.progress):
                words = speaking.words(self.decoder, write)
            self._said[half] = list(zip(*words.values(), strict=True))
        return self._said[half]

    def plans(self, scanned: Callable[[], Scan], texts: str = "") -> VerifiedPlans:
        """The verified plan of every size; ``scanned`` gives the scan of their calibration texts.

        Those of one name, the first by default.
        """
        name = texts or next(iter(self.texts))
        return VerifiedPlans(
            self._study,
            self.decoder,
            self.tokenizer,
            self.texts[name],
            fitted=self._study.fitted[name],
            scanned=scanned,
            judge=self.choosing(self.texts[name].choose),
            tokens=self.tokens,
            store=self._store,
        )

    def calibrated(self, name: str) -> Calibration:
        """Open the calibration texts of one name."""
        split, fitted = self.texts[name], self._study.fitted[name]
        opened = TokenBatches(self.tokenizer, split.fit, self.tokens, min_tokens=2)
        few = TokenBatches(self.tokenizer, split.fit[:VERIFYING_TEXTS], self.tokens, min_tokens=2)
        num_texts = self._study.settings.num_patching
        patch = QuickPatch(self.held_out.model, evenly(list(few), num_texts))
        patched = self.held_out.after(patch, fitted=fitted)
        batches = list(opened)
        return Calibration(name, split, fitted, batches, opened.identity, patch, patched)

    def judge_together(self, plans: Sequence[Plan], patched: PatchedTrials | None = None) -> None:
        """Judge the whole model and cuts at once, where each layer is read from disk for all.

        As they are, and ``patched`` if that is given.
        """
        clock = self.held_out.losses.clock
        started = clock()
        for trials in dict.fromkeys((self.held_out.losses, self.held_out.scores)):
            trials.judge_together([(), *plans])
        if patched is not None:
            patched.judge_together(plans)
        share = (clock() - started) / max(1, len(plans))
        self._shares = {plan.gone: share for plan in plans}

    def _loss(self, name: str, trials: Trials, cut: AnyCut) -> Scores:
        """Judge test texts, batch by batch in a bar of their own."""
        trials.judge_together([cut])
        with track(name, self.judge.num_items, self._study.progress) as advance:
            for look, batch in enumerate(self.judge.batches):
                trials.scores(cut, look + 1)
                advance(len(batch))
        return trials.scores(cut)

    def whole(self) -> Loss:
        """Measure the loss of the whole model, and show how far that is."""
        return self.loss_of_cut(None)

    def scores(self, plan: Plan | None) -> Scores:
        """Loss of a bare cut by text; of the whole model for None.

        ModelError for a loss that is not finite.
        """
        name = f"loss without {plan.words}" if plan else "loss, whole"
        return self._loss(name, self.held_out.losses, plan or ())

    def loss_of_cut(self, plan: Plan | None) -> Loss:
        """Measure the loss of a bare cut alone, without tasks or speech."""
        return self.held_out.loss(self.scores(plan))

    def measure(self, plan: Plan | None, state: State, on: Calibration) -> Measured:
        """Measure a cut in one of its states, or look it up; the whole model for None.

        ``on`` are the texts that the patch and the healing are made from.

        Raises PatchError, CacheError (damaged store), and ModelError or TextsError for a loss that
        is not finite or a task that cannot be done.
        """
        gone, clock = gone_by(plan or ()), self.held_out.losses.clock
        key = gone, state, on.name
        if key not in self._measured:
            inputs = self._inputs(plan, state, on)
            known = inputs and self._store.get("measurement", inputs)
            if known and "why" in known:
                raise PatchError(str(known["why"]))
            if known:
                found = recalled(partial(read, Measured), known, "a measurement")
            else:
                started = clock()
                try:
                    found = self._measure(plan, state, on)
                except PatchError as error:
                    if inputs and stays(error):
                        self._store.put("measurement", inputs, {"why": str(error)})
                    raise
                shared = self._shares.pop(gone, 0.0)
                found = replace(found, seconds=clock() - started + shared)
                if inputs:
                    self._store.put("measurement", inputs, found.to_record())
            self._measured[key] = found
        return self._measured[key]

    def _inputs(self, plan: Plan | None, state: State, on: Calibration) -> dict[str, Any] | None:
        """All that a measurement depends on beside the model; None where that is not known."""
        settings, job = self._study.settings, self._study.job
        if state == "healed":  # what is trained on is known by the study alone
            trained = {"state": state, "job": job, "fitted": on.fitted}
            return None if job is None else {**key_of(plan), **trained}
        made = {"patch_tokens": settings.patch_tokens} if settings.patch == "full" else {}
        made |= on.patch.settings if settings.patch == "quick" else {}
        return {
            **key_of(plan),
            "state": state,
            **(made if state == "patched" else {}),
            "fitted": on.fitted,
            "items": self._study.reported,
            "tasks": self._tasks_key,
            "seed": settings.seed,
            "prompts": prompts_fingerprint(self._study.prompts),
        }

    def _measure(self, plan: Plan | None, state: State, on: Calibration) -> Measured:
        is_quick = state == "patched" and self._study.settings.patch == "quick"
        if is_quick and plan and self._tasks is None and self._speech is None:
            return Measured(self.held_out.loss(on.patched.scores(plan)))
        if state == "cut" or plan is None:
            loss = self.loss_of_cut(plan)
            tasks = self._scores(self.decoder, self.tokenizer, store=self._store, plan=plan)
            return Measured(loss, tasks, speech=self.speech_of_cut(plan))
        speech = self.speech
        with self._in_state(plan, state, on) as (model, tokenizer):
            decoder = Decoder.of(model)
            found = Measured(self.loss_now(model), self._scores(decoder, tokenizer))
            said = None if speech is None else speech.compare(decoder, state)
        if speech is None or said is None:
            return found
        return replace(found, speech=speech.complete(said, self.decoder))

    def _scores(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        store: ResultStore | None = None,
        plan: Plan | None = None,
    ) -> tuple[TaskScores, ...]:
        """The main scores on the tasks, if there are any; ``store`` has those of bare cuts."""
        if (tasks := self._tasks) is None:
            return ()
        how: Any = {"tokens": tasks.tokens, "plan": plan}
        return tasks.main(tasks.kept((decoder, tokenizer), store, self._tasks_key, **how))

    @cached_property
    def speech(self) -> SpeechOnPrompts | None:
        """Speech beside the whole model, which has answered; None where no speech is measured."""
        if self._speech is not None:
            loaded, tokens = (self.decoder, self.tokenizer), self._speech.tokens
            self._speech.take_reference(loaded, tokens=tokens, store=self._store)
        return self._speech

    @cached_property
    def speech_of_whole(self) -> Speech | None:
        """How the whole model speaks; None where no speech is measured."""
        return self.speech_of_cut(None)

    def speech_of_cut(self, plan: Plan | None) -> Speech | None:
        """How a bare cut or the whole model speaks; None where no speech is measured."""
        if (speech := self._speech) is None:
            return None
        loaded, key = (self.decoder, self.tokenizer), speech.key(self._study.store)
        return speech.kept(loaded, self._store, key, tokens=speech.tokens, plan=plan)

    def loss_now(self, model: PreTrainedModel) -> Loss:
        """Measure a model with the layers and weights that it has now."""
        trials = Trials(Layerwise(model), self.judge, prepared=True)
        return self.held_out.loss(self._loss("loss", trials, ()))

    def keep_loss_of(self, place: Path, loss: Loss) -> None:
        """Keep a loss as that of a checkpoint, which makes what was measured to the bit."""
        source = self._study.model
        if isinstance(source, ModelSource) and loss.by_text is not None:
            kept = UnsavedResults()
            kept.add(self.test_set, loss.by_text, loss.vocab_size)
            saved = replace(source, path=place, gguf_file=None)
            kept.keep(
                partial(ModelStore.of, cache=self._study.store), saved, self.decoder.identity.dtype
            )

    def plan(self, dropped: Sequence[int]) -> Plan:
        """The plan of a cut of this model."""
        return replace(Plan.of(len(self.decoder), dropped), model=self.decoder.identity)

    @cached_property
    def num_parameters(self) -> int:
        """The parameters of the whole model."""
        return num_parameters(self.model)

    def parameters_share(self, plan: Plan | None) -> float:
        """The parameters that go by a plan, as a share of all."""
        return 0.0 if plan is None else parameters_share(self.decoder, plan)

    @contextmanager
    def _in_state(
        self, plan: Plan, state: State, on: Calibration
    ) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """The cut model in a state, for as long as the body runs."""
        if state == "healed":
            with self._healed(plan, on) as healed:
                yield healed
        elif self._study.settings.patch == "quick":
            with on.patch.patched(plan), without_layers(self.model, plan.dropped):
                yield self.model, self.tokenizer
        else:
            with with_patch(
                self.model,
                self.tokenizer,
                plan,
                texts=on.split.fit,
                max_length=self.tokens.max_length,
                num_tokens=self._study.settings.patch_tokens,
                progress=self._study.progress,
            ):
                yield self.model, self.tokenizer

    @contextmanager
    def _healed(
        self, plan: Plan, on: Calibration
    ) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """The cut, patched where it can be, and trained on; its folder is gone afterwards."""
        from ..healing.heal import heal  # with the packages of a training, which take seconds

        study, recipe = self._study, self._recipe
        assert recipe is not None
        mark = hash_of([study.job, on.name, list(plan.dropped)])[:16]
        folder = study.folder / HEALING_FOLDER / mark
        cut, healed = folder / "cut", folder / "healed"
        if study.job is None:
            shutil.rmtree(folder, ignore_errors=True)  # nobody knows of what it is
        if not healed.exists():
            if not cut.exists():
                self._save(plan, cut, on)
            name, trusted = study.origin
            heal(
                cut,
                study.training_texts(on.name),
                healed,
                recipe=recipe,
                eval_texts=study.splits[on.name].choose,
                original=None if recipe.objective == "lm" else name,
                merge=True,
                progress=study.progress,
                trust_remote_code=trusted,
            )
        dtype: Any = self.decoder.identity.dtype
        yield ModelSource(healed, dtype).load(progress=False)
        shutil.rmtree(folder, ignore_errors=True)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()

    def _save(self, plan: Plan, path: Path, on: Calibration) -> None:
        """Save the cut, patched where it can be."""
        try:
            with self._in_state(plan, "patched", on):
                save_model(self.model, self.tokenizer, path, plan=plan)
        except PatchError:
            with without_layers(self.model, plan.dropped):
                save_model(self.model, self.tokenizer, path, plan=plan)
