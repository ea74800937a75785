"""The whole way: from a model to the best shallower one, saved."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..cutting.gguf import check_any_cut
from ..cutting.request import gguf_of
from ..errors import ModelError, OutputError
from ..models.source import ModelSource
from ..processes import refuse_several
from ..progress import say_goes_on, stage, whole
from ..reporting.results import Run, weights_mark
from ..savings.devices import HERE, find_device
from ..settings.recipe import STEPS, Recipe
from ..settings.studies import RunSettings
from ..store.given_models import given_model
from ..store.store import open_store
from ..texts.prompts import Prompt, given_prompts, prompts_fingerprint
from ..texts.splits import refuse_shared
from ..values.files import (
    CHECKPOINT_FOLDER,
    GAIN_FILE,
    HEALED_FOLDER,
    HEAT_MAP_FILE,
    PARTIAL_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    SCAN_FILE,
)
from .answers import WantedAnswers, answers_for
from .study import NUM_PROMPTS, Items, Study, items_fingerprint, judged_items

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..values.entries import ResultStore
    from .healing_stage import HealingStage

RUN_FILES = (CHECKPOINT_FOLDER, SCAN_FILE, PLAN_FILE, GAIN_FILE, HEAT_MAP_FILE, RESULTS_FILE)
"""What a run leaves, but for the healed model."""


def run(
    model: "PreTrainedModel | ModelSource | str | Path",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: Iterable[str] = (),
    *,
    eval_texts: Iterable[str] | None = None,
    out: str | Path,
    settings: RunSettings | None = None,
    cache: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    report: Callable[[Run], None] | None = None,
    **options: Any,
) -> Run:
    """Recommend one shallower model, and make it.

    The layers are compared by a scan. Proposals of several criteria are raced after a quick patch.
    The race is by their loss or, with ``judge="speech"``, by their divergence from the whole model
    on its own words. The winner is patched, saved, reloaded by stock transformers and, with
    ``heal``, trained. The texts are divided into calibration, selection and test set: every
    reported number comes from texts that played no part in the selection. The judge of speech
    selects by one half of the prompts and reports the other half; losses are of texts, whatever the
    judge.

    The target is one of ``n``, ``fraction``, ``params``, ``max_loss``, ``target_latency`` and
    ``target_memory``; by none of them it is the knee of the curve of losses, or of divergences.
    Leaves in ``out`` the scan, the plan, ``results.json``, which is written before each next step,
    and ``checkpoint/``; with ``heal`` also ``healed/``, with ``plan_only`` no model. By
    ``patch=False`` the bare cut is chosen and saved, of a GGUF file as
    ``checkpoint/checkpoint.gguf`` in its own types. A run that was cut short goes on when it is
    called again with the same arguments, unless the cache is off. The model is as before.

    Args:
        model: a causal language model of transformers, or the source or the place that it is
            loaded from. If its layers are streamed, no speech is measured, which a warning says.
        tokenizer: the tokenizer of a model in memory.
        texts: calibration texts, any iterable of strings, read once. With ``heal`` they are kept
            in memory.
        eval_texts: held-out texts, which report. Calibration texts that are among them are left
            out. By default every fourth of ``texts``.
        out: the folder to write to.
        settings: the settings; by default those of :class:`RunSettings`.
        cache: keep what is measured, and reuse cached results.
        overwrite: replace what is in ``out``, part by part as the new ones are complete.
        progress: bars with ETA on standard error; by default if that is a terminal.
        report: receives the results before a healing starts, which may take days.
        options: settings by keyword, as ``n=8`` or ``heal=True``: any field of
            :class:`RunSettings`.

    Returns:
        The results, which are in ``results.json`` too: ``recommended.plan`` and
        ``recommended.loss`` are those of the model in ``checkpoint``.

    Raises:
        SettingsError: there is no such setting.
        PlanError: no cut reaches the target.
        OutputError: ``out`` holds another run, or cannot be written to.
        LayersError: a size that the model cannot lose, or more than one target; or ``max_loss`` by
            the judge ``speech``.
        CriterionError: there is no such judge.
        RecipeError: ``heal_steps`` without ``heal``, or settings that do not fit.
        TextsError: no texts, or too few for three sets; too few prompts or answers, or broken ones.
        StatesError: no text could be compared.
        ModelError: the model cannot be loaded, run or (for a target) counted, there is no such
            ``device``; ``heal``, answers or the judge ``speech`` of a model whose layers are
            streamed; or the saved checkpoint is another model; then ``results.json`` holds all that
            is known.
        CacheError: what the cache holds is damaged.
        MissingExtraError: ``heal`` without peft.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> done = sh.run(model, tokenizer, texts, eval_texts=held_out, out="runs/tiny", n=2)
        >>> len(done.recommended.plan.dropped), done.difference < 1e-4
        (2, True)
        >>> done.recommended.loss.nats <= done.recommended.cut.nats
        True
    """
    refuse_several("runs are")
    study = RunStudy(
        models=(given_model(model, tokenizer),),
        texts=texts,
        eval_texts=eval_texts,
        settings=RunSettings.of(settings, options),
        out=Path(out),
        overwrite=overwrite,
        store=open_store(not cache),
        progress=progress,
    )
    return study.run(report)


@dataclass(frozen=True, kw_only=True)
class RunStudy(Study[RunSettings]):
    """A run, which is checked when it is made."""

    RESULTS = RESULTS_FILE

    @property
    def leaves(self) -> Sequence[str]:
        """What must not be there yet; a scan may be, beside the work of the scan that made it."""
        names = [RESULTS_FILE, PLAN_FILE, HEAT_MAP_FILE]
        names += [] if self.settings.plan_only else [CHECKPOINT_FOLDER]
        names += [HEALED_FOLDER] if self.settings.heal else []
        return names if (self.folder / PARTIAL_FILE).exists() else [*names, SCAN_FILE]

    def check_kind(self) -> None:
        """Refuse what cannot be, before anything is loaded; as :func:`run`."""
        _ = self.items, self.prompts
        if self.gguf is not None:
            check_any_cut(self.gguf)
        wanted = self.wanted_answers
        if wanted is not None and not (wanted.are_there or wanted.chats_only):
            way_out = "leave out the answers (answers, --answers), or give a file that has them"
            self.refuse_on_disk("every token of an answer", way_out)
        heal, device = self.settings.heal, self.settings.device
        if isinstance(heal, Recipe):
            # A teacher is loaded by its name, which a model in memory need not have.
            heal.check(original=isinstance(self.model, ModelSource))
        if heal:
            way_out = "leave out heal (--heal), and heal OUT/checkpoint, which is smaller"
            self.refuse_on_disk("a training, at every step", way_out)
            from ..healing.checks import require_peft

            require_peft()
        if device not in (None, HERE):
            find_device(str(device))
        self.settings.target.size(self.model.count_layers())
        refuse_shared([*self.split.fit, *self.split.choose], ())

    def units(self) -> list[str]:
        """Name the whole model, and the cut where its size is known beforehand."""
        n = self.settings.target.size(self.model.count_layers())
        states = ("cut", "patched") if self.settings.patch else ("cut",)
        known = [] if n is None else [self.unit("recommended", n, s) for s in states]
        return [self.unit("whole", 0, "cut"), *known]

    @cached_property
    def gguf(self) -> Path | None:
        """The GGUF file that the checkpoint is cut from, in its own types; None where it is saved
        from memory, or not at all.
        """
        saves_bare = not (self.settings.patch or self.settings.plan_only)
        return gguf_of(self.model) if saves_bare else None

    @cached_property
    def items(self) -> tuple[Items, Items]:
        """The selection and test prompts, of the judge ``speech``."""
        prompts, seed = self.settings.prompts or None, self.settings.seed
        return judged_items(self.judges[0], prompts=prompts, seed=seed)

    @cached_property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts that models speak on; of the judge ``speech`` the test half."""
        given = self.settings.prompts
        if self.judges[0] != "speech" or given == ():
            return super().prompts
        report = cast(Sequence[Prompt], self.items[1])
        return report[:NUM_PROMPTS] if given is None else report

    def more_inputs(self) -> dict[str, Any]:
        """The training texts, the selection prompts and the prompts that models speak on."""
        return {
            "trained_on": self.trained_on() if self.settings.heal else None,
            "items": self._choosing_items,
            "prompts": prompts_fingerprint(self.prompts),
            "answers": self.wanted_answers and self.wanted_answers.inputs,
        }

    @property
    def _choosing_items(self) -> str:
        """A hash of the selection prompts; of nothing where texts do."""
        return items_fingerprint(self.judges[0], self.items[0])

    @cached_property
    def wanted_answers(self) -> WantedAnswers | None:
        """What the whole model is to say, to patch and to train on; None for nothing."""
        given, heal = self.settings.answers, self.settings.heal
        if given is False or (given is None and self._takes_no_answers):
            return None
        recipe = heal if isinstance(heal, Recipe) else Recipe(steps=self.settings.heal_steps)
        count = answers_for(recipe.steps or STEPS if heal else None)
        prompts = None if isinstance(given, bool | None) else given_prompts(given)
        return WantedAnswers(prompts, count, seed=self.settings.seed, chats_only=given is None)

    @property
    def _takes_no_answers(self) -> bool:
        """Whether no answers are learned from, or every token of them would read all layers."""
        learns = self.settings.patch and not self.settings.plan_only
        return not learns or any(model.is_streamed for model in self.models)

    @staticmethod
    def _job_in(values: Any) -> Any:
        return values["marks"]["job"]

    @cached_property
    def goes_on(self) -> bool:
        """Whether what is in ``out`` is of this very run, and unchanged if it has ended."""
        if self.written is None:
            return False
        marks, folder = self.written["marks"], self.folder / CHECKPOINT_FOLDER
        if not marks.get("ended") or not folder.exists():
            return True
        return bool(marks.get("checkpoint") == weights_mark(folder))

    @cached_property
    def earlier(self) -> Run | None:
        """The results of this very run as far as it came before; None if it did not."""
        if not self.goes_on:
            return None
        try:
            return Run.load(self.folder)
        except (OutputError, ModelError):  # ModelError: the healed model has been taken away
            return None

    def run(self, report: Callable[[Run], None] | None = None) -> Run:
        """Run, or give what is there already; ``report`` receives the results before a healing."""
        self.check()
        with self.alone():
            return self._run(report)

    def _run(self, report: Callable[[Run], None] | None) -> Run:
        if self.overwrite:
            (self.folder / PARTIAL_FILE).unlink(missing_ok=True)
        if self.goes_on:  # what was being saved when it was killed
            for left in self.folder.glob(f".{CHECKPOINT_FOLDER}.*"):
                shutil.rmtree(left, ignore_errors=True)
        if self.earlier is not None and not self.earlier.marks.get("ended"):
            say_goes_on(self.earlier.reached, self.progress)
        with whole("run", self._num_stages, self.progress):
            done = self._done(report)
        self.say_read()
        done = replace(done, marks={**done.marks, "ended": "yes"})
        done.save()
        return done

    @property
    def _num_stages(self) -> int:
        """The stages, at most, of a target that the first cut reaches."""
        of = self.settings
        saves, patches = not of.plan_only, of.patch and not of.plan_only
        return 8 + saves + 3 * patches + bool(of.heal)

    def _done(self, report: Callable[[Run], None] | None) -> Run:
        from ..cutting.laid_over import require_whole
        from ..models.decoder import Decoder
        from .recommending import Recommending

        _ = self.splits
        with stage("load the model"):
            loaded, tokenizer = self.load(self.model)
        if not self.settings.plan_only:
            require_whole(loaded, self.settings.text_only)
        wanted = self.wanted_answers and self.wanted_answers.of(Decoder.of(loaded), tokenizer)
        healing = None
        if self.settings.heal:
            healing = self._healing_stage(loaded, tokenizer, answers=wanted is not None)
        store: ResultStore = self.model_store(self.model)
        recommending = Recommending(self, loaded, tokenizer, store, wanted, gguf=self.gguf)
        done = recommending.run(self.earlier)
        if report is not None:
            report(done)
        if healing is not None and done.healing is None and not done.is_unhealed:
            speech, answers = recommending.speech, recommending.answers
            del loaded, recommending  # nothing needs them, and the training needs their memory
            with stage("heal"):
                done = healing.heal(done, speech, answers)
        return done

    def _healing_stage(self, model: Any, tokenizer: Any, *, answers: bool) -> "HealingStage":
        """The healing, which is refused before any long work where it cannot be."""
        from .healing_stage import HealingStage, choose_recipe

        heal, steps = self.settings.heal, self.settings.heal_steps
        recipe = heal if isinstance(heal, Recipe) else None
        chosen = recipe or choose_recipe(model, steps, self.settings.seed)
        stage = HealingStage(self, replace(chosen, share=self.settings.share))
        stage.check(model, tokenizer, answers=answers)
        return stage
