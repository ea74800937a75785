"""What a study takes at most, before anything is loaded: texts, memory, disk and time.

The settings give the work; a layer with random weights gives the speed (``forecasts.speed``).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from ..evaluation.speech import SPEECH_TOKENS
from ..forecasts.forecast import Stage, forecast_source, memory_forecast
from ..forecasts.speed import Work, device_of, told
from ..forecasts.work import Counted, forecast, patched, run, solved, spoken, trained, written
from ..judgement.bounds import verifying_forwards
from ..judgement.choosing_size import sizes_beside
from ..judgement.criteria import criteria
from ..judgement.criteria.experts import EverySet
from ..judgement.criterion import Criterion, Search
from ..judgement.held_out_cuts import TRUTH_ITEMS
from ..judgement.judges.judge import looks
from ..judgement.proposals import PROPOSING_TEXTS
from ..judgement.subject import Subject
from ..judgement.token_states import PROBED
from ..judgement.verifying import PATCH_TEXTS
from ..memory.rehearsal import build_empty
from ..memory.streaming import StreamPlan
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from ..patching.descent import most_steps
from ..patching.quick import RIDGES
from ..storage import free_bytes
from ..texts.batches import TokenBatches
from ..texts.prompts import prompt_ids
from ..values.curve import OWN_STRATEGIES, SCANNED
from ..values.estimates import Disk, Divided
from ..values.forwards import Forwards
from ..values.memory import MemoryPlan
from ..values.recipe import Recipe
from ..values.settings import CompareSettings, CurveSettings, RunSettings
from ..values.speech import WAYS
from .answers import WantedAnswers
from .compare import CompareStudy
from .disk import sizes_of, study_bytes
from .recommending import SCAN_TEXTS, TABLE_REPORTS, patch_tokens
from .stream_plans import StepsPlan, StudyPasses, plan_passes, plan_steps
from .study import Study
from .verified_plans import TABLE_TEXTS, VERIFYING_TEXTS

QUICK_SOLVES = 1 + len(RIDGES) / 2
"""Those of a quick patch, about."""


def describe(study: Study[Any]) -> dict[str, Any]:
    """Describe what a study of sources would take, or why that is unknown.

    These are the split, the largest memory, disk and time. TextsError for too few texts.
    """
    counts = {
        name: (len(split.fit), len(split.choose), len(split.report))
        for name, split in study.splits.items()
    }
    described: dict[str, Any] = {"split": Divided(counts)}
    if getattr(study, "entry", None) is not None:
        return {**described, "time": "none: the result is cached"}
    models = cache(
        lambda: [_Model(study, model) for model in study.models if isinstance(model, ModelSource)]
    )
    tasks = "tasks" if getattr(study.settings, "tasks", ()) else ""
    ways: dict[str, Callable[[], Any]] = {
        "memory": lambda: max((one.memory() for one in models()), key=_peak),
        "disk": lambda: Disk(study_bytes(study), free_bytes(study.folder)),
        "time": lambda: forecast(*[one.counted() for one in models()], beside=tasks),
    }
    if study.out is None:
        del ways["disk"]
    if any(model.waits_on_disk for model in study.models):
        ways["stream"] = lambda: max((one.stream() for one in models()), key=_read)
        if _patches(study.settings):
            ways["steps"] = lambda: models()[0].steps()
    return {**described, **{name: told(way) for name, way in ways.items()}}


def _read(plan: StreamPlan) -> int:
    return plan.bytes_read


def _patches(settings: Any) -> bool:
    """Whether cuts are patched in full."""
    if isinstance(settings, CurveSettings):
        return settings.patch == "full"
    return isinstance(settings, RunSettings) and not settings.plan_only


def _peak(plan: MemoryPlan) -> int:
    return plan.peak_bytes or 0


class _Texts:
    """The tokens of the texts of one split, and of the items of its judge.

    Where that is of speech, they are ``judged``, and ``num_spoken`` prompts are answered for it.
    """

    def __init__(self, study: Study[Any], tokenizer: Any, name: str, texts_at_once: int) -> None:
        tokens = replace(study.settings.tokens, batch_size=texts_at_once)
        split = study.splits[name]
        self.batches = list(TokenBatches(tokenizer, split.fit, tokens, min_tokens=2))
        self.fit = np.array(
            [length for batch in self.batches for length in batch.attention_mask.sum(axis=1)]
        )
        self.choose, self.report = (
            np.array(
                [
                    len(ids)
                    for ids in TokenBatches(tokenizer, some, tokens, min_tokens=2).token_ids()
                ]
            )
            for some in (split.choose, split.report)
        )
        self.judged, self.num_spoken = self.choose, 0
        if study.judges[0] == "speech":
            halves: Any = study.items
            found = prompt_ids(tokenizer, halves[0])
            self.judged = np.array([len(WAYS) * (len(ids) + SPEECH_TOKENS) for ids in found])
            self.num_spoken = sum(map(len, halves[: study.judges.count("speech")]))
        self.at_once, self.tokenizer = texts_at_once, tokenizer

    def looks(self, num_choosing: int | None = None) -> list[int]:
        """The items of each look at the selection set, or at the first of them."""
        count = len(self.judged[:num_choosing])
        return [part.stop - part.start for part in looks(count, self.at_once)]


class _Model:
    """What a study takes of one of its models."""

    def __init__(self, study: Study[Any], source: ModelSource) -> None:
        self.study, self.settings = study, study.settings
        self.source = source.resolved()
        self.config = source.read_config()
        self.empty = build_empty(self.config, plain_dtype(self.source.dtype))
        self.decoder = Decoder.of(self.empty)
        self.layers = len(self.decoder)
        self.on_cpu = device_of(self.source).type == "cpu"
        self.forward = self._planned("eval")

    # Memory.
    def memory(self) -> MemoryPlan:
        """The memory of the stage that needs most."""
        by_experts = getattr(self.study, "by_experts", False)
        found = [self.forward, self._planned("scan", experts=by_experts)]
        if fitted := self._patch_tokens:
            found.append(self._planned("patch", num_tokens=fitted))
        if self._recipe is not None:
            answers = self._answers is not None
            found.append(memory_forecast(self.config, "heal", recipe=self._recipe, answers=answers))
        return max(found, key=_peak)

    def _planned(self, stage: Stage, **options: Any) -> MemoryPlan:
        return forecast_source(self.source, stage, self.settings.tokens, **options)

    @property
    def _sizes(self) -> list[int]:
        return sizes_of(self.settings, self.layers)

    @cached_property
    def _patch_tokens(self) -> int:
        """Tokens that a full patch fits; 0 where there is none."""
        if not _patches(self.settings):
            return 0
        if isinstance(self.settings, CurveSettings):
            return self.settings.patch_tokens
        return patch_tokens(num_parameters(self.empty), on_cpu=self.on_cpu)

    @cached_property
    def _recipe(self) -> Recipe | None:
        """The settings of a healing, if there is one."""
        settings = self.settings
        heals = getattr(settings, "heal", None)
        if isinstance(settings, CurveSettings) and "healed" not in settings.states:
            return None
        if isinstance(settings, CompareSettings) or heals is False:
            return None
        if isinstance(heals, Recipe):
            return heals
        dtype: Any = "bfloat16" if self.source.dtype == "float16" else self.source.dtype
        return Recipe(dtype=dtype, steps=settings.heal_steps)

    @property
    def _answers(self) -> WantedAnswers | None:
        """What the model is to say, for a patch or a healing; None for nothing."""
        found = getattr(self.study, "wanted_answers", None) if self._patch_tokens else None
        assert found is None or isinstance(found, WantedAnswers)
        return found

    # Time.
    def counted(self) -> Counted:
        """Count all of the work, about."""
        work = Work()
        for name in self.study.splits:
            self.texts = self._texts(name)
            work += self._work()
        return Counted(self.source, work, self.texts.at_once, float(self.texts.report.mean()))

    def _work(self) -> Work:
        if isinstance(self.settings, RunSettings):
            return self._of_run()
        if isinstance(self.settings, CurveSettings):
            return self._of_curve()
        return self._of_comparison()

    def _of_run(self) -> Work:
        settings, sizes = self.settings, self._sizes
        n, models, beside = min(sizes), 2 if settings.plan_only else 3, self._beside
        work = self._measured(0) + self._scan(SCAN_TEXTS) + self._measured(n) * 2 + self._spoken
        for size in sizes:
            work += self._verified(size)
        for size in beside:
            work += self._verified(size, TABLE_TEXTS)
        share = min(1.0, TABLE_REPORTS / len(self.texts.report))
        for size in (*sizes, *beside):
            of = 1.0 if size in sizes else share
            # The winner and the deepest layers, of whose states half are known, and nearly all.
            work += (self._measured(size) * 2 + self._quick(size) * 2) * of
        models += self._recipe is not None
        if not self.source.waits_on_disk:
            ids = prompt_ids(self.texts.tokenizer, self.study.prompts)
            prompts = np.array([len(one) for one in ids])
            for left in (self.layers, *[self.layers - n] * (models - 1)):
                work += spoken(left, self.layers, prompts, num_tokens=SPEECH_TOKENS)
        if self._answers is not None:
            work += written(self.layers, self._answers.num_written)
        if self._patch_tokens:
            work += self._patched(n) + self._measured(n)
        if self._recipe is not None:
            work += self._healed(n)
        return work

    @property
    def _beside(self) -> list[int]:
        """The sizes of the table of a run beside those that are decided."""
        sizes = self._sizes
        found = {more for size in sizes for more in sizes_beside(size, self.layers)}
        return sorted(found - {*sizes})[: 2 * len(sizes)]

    def stream(self) -> StreamPlan:
        """What is read of a model whose layers are streamed from disk, at most, about."""
        settings, passes = self.settings, []
        found = StudyPasses(self.layers, settings, self._first_texts)
        if isinstance(settings, RunSettings):
            passes += found.of_run(self._sizes, self._beside)
            if self._patch_tokens:  # and its checkpoint, saved and compared
                passes += [*found.patched(self._middle, self._num_steps), (2, 0)]
        elif isinstance(settings, CurveSettings):
            passes += found.of_curve(self._subject(self._first_texts, settings.n), self._foreign)
            if self._patch_tokens:
                passes += self._num_patches * found.patched(self._middle, self._num_steps)
        else:
            assert isinstance(self.study, CompareStudy)
            for name in self.study.splits:
                found = replace(found, texts=self._texts(name))
                if self.study.by_experts:
                    passes += found.of_experts(*self._of_experts(self.study))
                else:
                    subject = self._subject(self._texts(name), settings.n)
                    passes += found.of_comparison(subject, self.study.criteria)
        return plan_passes(self.source, passes)

    def steps(self) -> StepsPlan:
        """What the steps of all full patches take of the disk, of blocks in the middle."""
        each, count = plan_steps(self.empty, self._middle, self._num_steps), self._num_patches
        return replace(each, steps=count * each.steps, passes=count * each.passes)

    @property
    def _num_patches(self) -> int:
        """The full patches of a run or a curve."""
        settings = self.settings
        is_curve = isinstance(settings, CurveSettings)
        return len(settings.n) * len(settings.strategies) if is_curve else 1

    @property
    def _middle(self) -> range:
        """The block in the middle, of the fewest layers that go."""
        n = min(size for size in self._sizes if size) if any(self._sizes) else 1
        begin = max(1, (self.layers - n) // 2)
        return range(begin, begin + n)

    @property
    def _num_steps(self) -> int:
        """The steps of a full patch, at most."""
        return most_steps(min(self._patch_tokens, 7 / 8 * self._first_texts.fit.sum()))

    @cached_property
    def _first_texts(self) -> _Texts:
        return self._texts(next(iter(self.study.splits)))

    def _texts(self, name: str) -> _Texts:
        tokenizer = self.source.load_tokenizer()
        return _Texts(self.study, tokenizer, name, self.forward.micro_batch)

    def _subject(self, texts: _Texts, sizes: Sequence[int]) -> Subject:
        trials: Any = None  # no passes look at them
        return Subject(self.decoder, texts.batches, trials, sizes)

    @property
    def _foreign(self) -> list[Criterion]:
        """The strategies of a curve that are criteria."""
        return [criteria[one] for one in self.settings.strategies if one not in OWN_STRATEGIES]

    def _of_curve(self) -> Work:
        settings, work = self.settings, self._measured(0)
        strategies = settings.strategies
        if {*SCANNED} & {*strategies}:
            work += self._scan(len(self.texts.fit))
        work += self._chosen(self._foreign, settings.n)
        for n in settings.n:
            work += self._verified(n) * ("recommended" in strategies)
            for state in settings.states:
                each = self._measured(n)
                if state != "cut" and not settings.quick_patch:
                    each += self._patched(n)
                elif state != "cut":
                    each += self._quick(n)
                if state == "healed":
                    each += self._healed(n)
                work += each * len(strategies)
        return work

    def _of_comparison(self) -> Work:
        study, texts = self.study, self.texts
        assert isinstance(study, CompareStudy)
        if study.by_experts:
            reporting, choosing = self._of_experts(study)
            scanned = Work(observed=self.layers * float(texts.fit.sum())) + self._spoken
            choosing_work = run(Forwards(self.layers, 1), texts.judged) * choosing
            return scanned + self._measured(0) * reporting + choosing_work
        work, chosen = self._measured(0) + self._spoken, study.criteria
        truth = Forwards(self.layers * (self.layers + 1) / 2, self.layers + 1)
        work += run(truth, texts.report[:TRUTH_ITEMS])
        work += self._chosen(chosen, self.settings.n)
        work += run(Forwards(self.layers), texts.fit)  # the states that all quick patches share
        for n in self.settings.n:
            each = self._measured(n) * 2 + self._quick(n, len(texts.fit))
            if texts.num_spoken:  # as many tokens report as choose, about
                each += run(Forwards(self.layers - n, 1), texts.judged)
            work += each * len(chosen)
        return work

    def _of_experts(self, study: CompareStudy) -> tuple[int, int]:
        """How often a whole model runs over all test and selection texts, at most."""
        settings, on_disk, tried = study.settings, self.source.waits_on_disk, 0
        for one in study.criteria:
            if isinstance(one, EverySet):
                by_default = settings.criteria is None
                sizes = one.cheap(self.decoder, settings.n, on_disk=on_disk and by_default)
                tried = sum(one.num_tried(self.decoder, n) for n in sizes)
        each = 1 if settings.judge == "loss" else 2
        return each * (1 + len(study.criteria) * len(settings.n)), tried

    # The parts of it.
    @property
    def _spoken(self) -> Work:
        """What the whole model says by which others are judged."""
        return written(self.layers, len(WAYS) * SPEECH_TOKENS * self.texts.num_spoken)

    def _measured(self, n: int) -> Work:
        """The loss of a cut on the test texts."""
        return run(Forwards(self.layers - n, 1), self.texts.report)

    def _scan(self, most: int) -> Work:
        return run(Forwards(self.layers), self.texts.fit[:most])

    def _verified(self, n: int, num_choosing: int | None = None) -> Work:
        fit = self.texts.fit[:VERIFYING_TEXTS]
        some, proposing = fit[:PATCH_TEXTS], min(PROPOSING_TEXTS, len(fit))
        found = verifying_forwards(
            self.layers,
            n,
            self.texts.looks(num_choosing),
            top=self.settings.top,
            proposing=self.layers * (2 * proposing + PROBED),
            patch_texts=len(some),
        )
        solves = solved(self.empty, n, some.sum(), solves=QUICK_SOLVES) * (self.settings.top + 3)
        return Work(found.layers, found.heads) * self.texts.judged.mean() + solves

    def _quick(self, n: int, texts: int = PATCH_TEXTS) -> Work:
        fit = self.texts.fit[:texts]
        return run(Forwards(n), fit) + solved(self.empty, n, fit.sum(), solves=QUICK_SOLVES)

    def _patched(self, n: int) -> Work:
        """A full patch of a block in the middle."""
        begin = max(1, (self.layers - n) // 2)
        dropped = range(begin, begin + n)
        return patched(
            self.empty, self.layers, dropped, fit=self.texts.fit, most=self._patch_tokens
        )

    def _healed(self, n: int) -> Work:
        """A training of all layers that are left, its evaluations, and the loss afterwards."""
        assert self._recipe is not None
        from ..healing.checks import auto_dtype, facts

        recipe = self._recipe.resolve(facts(self.config, self.layers), auto=auto_dtype())
        left, whole, choose = self.layers - n, self.layers, self.texts.choose
        length = min(recipe.max_length, self.texts.fit.mean())
        training = trained(recipe, left, whole, length=length, held=choose.sum())
        return training + self._measured(n)

    def _chosen(self, chosen: Sequence[Criterion], sizes: Sequence[int]) -> Work:
        """What criteria run to choose so many layers; passes that several share are made once."""
        subject = self._subject(self.texts, sizes)
        passes = {type(one).layer_forwards: one.layer_forwards(subject) for one in chosen}
        work = Work(sum(passes.values())) * self.texts.fit.mean()
        for one in chosen:
            each = isinstance(one, Search) and not one.nested
            counted = sizes if each else sizes[-1:]
            for n in counted:
                found = one.trial_forwards(self.layers, self.texts.looks(), n)
                work += Work(found.layers, found.heads) * self.texts.judged.mean()
        return work
