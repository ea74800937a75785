"""What a study takes at most, before anything is loaded: texts, memory, disk and time.

The settings give the work; a layer with random weights gives the speed (``forecasts.speed``).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from math import ceil
from operator import attrgetter
from typing import Any

import numpy as np

from ..evaluation.speech import SPEECH_TOKENS
from ..forecasts.forecast import Stage, forecast_source, memory_forecast
from ..forecasts.speed import Work, device_of, told
from ..forecasts.stream_plans import plan_passes
from ..forecasts.work import (
    CHECKED,
    QUICK_SOLVES,
    Counted,
    CutWork,
    forecast,
    run,
    solved,
    spoken,
    written,
)
from ..judgement.bounds import verifying_forwards
from ..judgement.choosing_size import sizes_beside
from ..judgement.criteria import criteria
from ..judgement.criteria.experts import EverySet
from ..judgement.criteria.searches import single_layers
from ..judgement.criterion import Criterion, Search
from ..judgement.held_out_cuts import TRUTH_ITEMS
from ..judgement.judges.judge import looks
from ..judgement.proposals import proposing_layers
from ..judgement.subject import Subject
from ..judgement.verifying import PATCH_TEXTS
from ..memory.rehearsal import build_empty
from ..memory.streaming import StreamPlan
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from ..models.unsaved import unsaved
from ..patching.patch import patch_tokens
from ..storage import free_bytes, temporary
from ..texts.batches import TokenBatches
from ..texts.prompts import prompt_ids
from ..values.curve import OWN_STRATEGIES, SCANNED
from ..values.estimates import Disk, Divided
from ..values.forwards import Forwards
from ..values.memory import MemoryPlan
from ..values.recipe import Recipe
from ..values.settings import CurveSettings, RunSettings
from ..values.speech import WAYS
from .answers import WantedAnswers
from .compare import CompareStudy
from .disk import patches, sizes_of, study_bytes, temporary_of
from .recommending import SCAN_TEXTS, TABLE_REPORTS
from .study import Study
from .verified_plans import TABLE_TEXTS, VERIFYING_TEXTS


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
        "time": lambda: forecast(*[one.counted for one in models()], beside=tasks),
    }
    if study.out is None:
        del ways["disk"]
    whole = study.models[0]
    if isinstance(study.settings, RunSettings) and isinstance(whole, ModelSource):
        described |= {"not_saved": lost} if (lost := unsaved(whole)) else {}
    if patches(study.settings):
        ways["temporary"] = lambda: Disk(temporary_of(study), free_bytes(temporary()))
    if any(model.waits_on_disk for model in study.models):
        ways["stream"] = lambda: max(
            (one.stream() for one in models()), key=attrgetter("bytes_read")
        )
    return {**described, **{name: told(way) for name, way in ways.items()}}


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
        self.fit = np.concatenate([batch.attention_mask.sum(axis=1) for batch in self.batches])
        self.choose, self.report = (
            np.array([*map(len, TokenBatches(tokenizer, some, tokens, min_tokens=2).token_ids())])
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
        if not patches(self.settings):
            return 0
        if isinstance(self.settings, CurveSettings):
            return self.settings.patch_tokens
        return patch_tokens(num_parameters(self.empty), on_cpu=self.on_cpu)

    @cached_property
    def _recipe(self) -> Recipe | None:
        """The settings of a healing, if there is one."""
        settings, heals = self.settings, getattr(self.settings, "heal", False)
        if heals is False or "healed" not in getattr(settings, "states", ("healed",)):
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

    # The work, for its time and for what it reads from disk.
    @cached_property
    def counted(self) -> Counted:
        """Count all of the work, about."""
        work = Work(passes=(CHECKED,))
        ways = {RunSettings: self._of_run, CurveSettings: self._of_curve}
        for name in self.study.splits:
            self.texts = self._texts(name)
            self.cuts = self._cuts()
            work = sum(ways.get(type(self.settings), self._of_comparison)(), work)
        length = float(self.texts.report.mean())
        return Counted(self.source, work, self.texts.at_once, length)

    def stream(self) -> StreamPlan:
        """What is read of a model whose layers are streamed from disk, at most, about."""
        return plan_passes(self.source, self.counted.work.passes)

    def _texts(self, name: str) -> _Texts:
        tokenizer = self.source.load_tokenizer()
        return _Texts(self.study, tokenizer, name, self.forward.micro_batch)

    def _subject(self, sizes: Sequence[int]) -> Subject:
        trials: Any = None  # no count looks at them
        return Subject(self.decoder, self.texts.batches, trials, sizes)

    def _cuts(self) -> CutWork:
        return CutWork(
            config=self.config,
            num_layers=self.layers,
            fit=self.texts.fit,
            report=self.texts.report,
            held=float(self.texts.choose.sum()),
            patch_tokens=self._patch_tokens,
            recipe=self._recipe,
            model=self.empty,
        )

    def _of_run(self) -> Iterator[Work]:
        settings, sizes, cuts = self.settings, self._sizes, self.cuts
        n, models = min(sizes), 3 if self._patch_tokens else 2
        yield self._scan(SCAN_TEXTS)
        yield cuts.measured(0) + cuts.measured(n) + cuts.measured(n)
        yield self._spoken
        found = {more for size in sizes for more in sizes_beside(size, self.layers)}
        beside = sorted(found - {*sizes})[: 2 * len(sizes)]
        yield from self._verified(sizes, beside)
        share = min(1.0, TABLE_REPORTS / len(self.texts.report))
        for size in (*sizes, *beside):
            # The winner and the deepest layers, of whose states half are known, and nearly all.
            quick = cuts.quick(size) if settings.patch else Work()
            row = cuts.measured(size, size) + quick + quick
            yield row * (1.0 if size in sizes else share)
        models += self._recipe is not None
        if not self.source.waits_on_disk:
            ids = prompt_ids(self.texts.tokenizer, self.study.prompts)
            prompts = np.array([len(one) for one in ids])
            for left in (self.layers, *[self.layers - n] * (models - 1)):
                yield spoken(left, self.layers, prompts, num_tokens=SPEECH_TOKENS)
        if self._answers is not None and self._answers.is_for(self.texts.tokenizer):
            yield written(self.layers, self._answers.num_written)
        if self._patch_tokens:
            yield cuts.patched(n) + cuts.measured(n)
        if not settings.plan_only:  # the checkpoint is saved and compared
            yield Work(passes=((2, 0),))
        if self._recipe is not None:
            yield cuts.healed(n) + cuts.measured(n)

    def _of_curve(self) -> Iterator[Work]:
        settings, cuts, strategies = self.settings, self.cuts, self.settings.strategies
        yield cuts.measured(0)
        if {*SCANNED} & {*strategies}:
            yield self._scan(len(self.texts.fit))
        foreign = [criteria[one] for one in strategies if one not in OWN_STRATEGIES]
        yield from self._chosen(foreign, settings.n)
        yield from self._verified(settings.n if "recommended" in strategies else ())
        sizes = [n for n in settings.n if n for _ in strategies]
        for state in settings.states:
            if state == "cut" or settings.quick_patch:
                yield cuts.measured(*sizes)
            if state != "cut" and settings.quick_patch:
                yield cuts.quick(*sizes)
            for n in sizes:
                if state != "cut" and not settings.quick_patch:
                    yield cuts.patched(n) + cuts.measured(n)
                if state == "healed":
                    yield cuts.healed(n) + cuts.measured(n)

    def _of_comparison(self) -> Iterator[Work]:
        study, texts, cuts, whole = self.study, self.texts, self.cuts, self.layers
        assert isinstance(study, CompareStudy)
        yield self._spoken
        if study.by_experts:
            reporting, choosing = self._of_experts(study)
            fit = float(texts.fit.sum())
            yield Work(observed=whole * fit, passes=((2, fit),))
            yield run(Forwards(whole * reporting, reporting, reporting), texts.report)
            yield run(Forwards(whole * choosing, choosing, choosing), texts.judged)
            return
        yield cuts.measured(0) + Work(passes=(CHECKED,))
        yield run(single_layers(whole), texts.report[:TRUTH_ITEMS])
        yield from self._chosen(study.criteria, self.settings.n)
        yield run(Forwards(whole, passes=1), texts.fit)  # the states that all quick patches share
        sizes = [n for n in self.settings.n for _ in study.criteria]
        yield cuts.measured(*sizes) + cuts.measured(*sizes)
        yield cuts.quick(*sizes, texts=len(texts.fit))
        if texts.num_spoken:  # as many tokens report as choose, about
            yield run(Forwards(sum(whole - n for n in sizes), len(sizes)), texts.judged)
        if study.judges[0] != "loss":  # which sees the whole model, and the cuts, by itself
            yield Work(passes=(*cuts.measured(0).passes * 2, *cuts.measured(*sizes).passes))

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

    def _scan(self, most: int) -> Work:
        return run(Forwards(self.layers, passes=1), self.texts.fit[:most])

    def _verified(self, sizes: Sequence[int], beside: Sequence[int] = ()) -> Iterator[Work]:
        """Races for some sizes, and on fewer items for those beside them."""
        fit, top = self.texts.fit[:VERIFYING_TEXTS], self.settings.top
        some, proposing = fit[:PATCH_TEXTS], proposing_layers(self._subject(sizes))
        for _ in range(1 + bool(beside)):  # proposals are two passes, quick patches share one
            yield Work(passes=(CHECKED, (3, fit.sum())))
        for n, count in [*((n, None) for n in sizes), *((n, TABLE_TEXTS) for n in beside)]:
            found = verifying_forwards(
                self.layers,
                n,
                self.texts.looks(count),
                top=top,
                proposing=proposing,
                patch_texts=len(some),
                after=self.settings.after,
            )
            yield run(found, self.texts.judged.mean())
            if self.settings.after == "patch":
                yield solved(self.empty, n, tokens=some.sum(), solves=QUICK_SOLVES) * (top + 3)

    def _chosen(self, chosen: Sequence[Criterion], sizes: Sequence[int]) -> Iterator[Work]:
        """What criteria run to choose so many layers; passes that several share are made once."""
        subject = self._subject(sizes)
        ways = {type(one).layer_forwards: one.layer_forwards(subject) for one in chosen}
        passes = len(chosen) + sum(ceil(n / self.layers / subject.num_texts) for n in ways.values())
        layers, fit = sum(ways.values()), self.texts.fit
        yield Work(layers * fit.mean(), passes=((passes, fit.sum()),))
        for one in chosen:
            each = isinstance(one, Search) and not one.nested
            for n in sizes if each else sizes[-1:]:
                trials = one.trial_forwards(self.layers, self.texts.looks(), n)
                yield run(trials, self.texts.judged.mean())
