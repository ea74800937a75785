"""What a study takes at most, before anything is loaded: texts, memory, disk and time.

The settings give the work; a layer with random weights gives the speed (``forecasts.speed``).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, cached_property
from operator import attrgetter
from typing import Any

import numpy as np

from ..cutting.laid_over import not_saved
from ..forecasts.forecast import Stage, forecast_source, memory_forecast
from ..forecasts.speed import Work, device_of, or_unknown
from ..forecasts.work import (
    CHECKED,
    Counted,
    forecast,
    patched,
    plan_passes,
    run,
    spoken,
    trained,
    written,
)
from ..judgement.criteria import RECOMMENDED, SCANNED
from ..judgement.criteria.searches import OneShot
from ..judgement.criterion import Search
from ..judgement.held_out_cuts import TRUTH_ITEMS
from ..judgement.proposals import PROPOSING_TEXTS, block_layers
from ..judgement.verifying import PATCH_TEXTS
from ..memory.rehearsal import build_empty
from ..memory.streaming import StreamPlan
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from ..patching.descent import STEP_TOKENS, most_steps
from ..patching.patch import patch_tokens
from ..patching.solver import SOLVING, PatchLayers
from ..patching.states import MAX_HELD_OUT
from ..results.speech import WAYS
from ..settings.recipe import Recipe
from ..settings.studies import CompareSettings, RunSettings
from ..storage import free_bytes, temporary
from ..texts.batches import TokenBatches
from ..texts.prompts import prompt_ids
from ..texts.splits import Splits
from ..values.estimates import MemoryPlan, disk, divided
from ..values.tokens import SPEECH_TOKENS
from .answers import WantedAnswers
from .compare import CompareStudy
from .disk import patches, sizes_of, study_bytes, temporary_of
from .recommending import SCAN_TEXTS
from .study import Study


def describe(study: Study[Any]) -> dict[str, Any]:
    """Describe what a study of sources would take, or why that is unknown.

    These are the split, the largest memory, disk and time. TextsError for too few texts.
    """
    counts = {
        name: (len(split.fit), len(split.choose), len(split.report))
        for name, split in study.splits.items()
    }
    described: dict[str, Any] = {"split": divided(counts)}
    if getattr(study, "entry", None) is not None:
        return {**described, "time": "none: the result is cached"}
    models = cache(
        lambda: [_Model(study, model) for model in study.models if isinstance(model, ModelSource)]
    )
    tasks = "tasks" if getattr(study.settings, "tasks", ()) else ""
    ways: dict[str, Callable[[], Any]] = {
        "memory": lambda: max((one.memory() for one in models()), key=_peak),
        "disk": lambda: disk(study_bytes(study), free_bytes(study.folder)),
        "time": lambda: forecast(*[one.counted for one in models()], beside=tasks, at_least=True),
    }
    if study.out is None:
        del ways["disk"]
    whole = study.models[0]
    if isinstance(study.settings, RunSettings) and isinstance(whole, ModelSource):
        lost = not_saved(whole, study.settings.text_only)
        described |= {"not_saved": lost} if lost else {}
    if patches(study.settings):
        ways["temporary"] = lambda: disk(temporary_of(study), free_bytes(temporary()))
    if any(model.is_streamed for model in study.models):
        ways["stream"] = lambda: max(
            (one.stream() for one in models()), key=attrgetter("bytes_read")
        )
    return {**described, **{name: or_unknown(way) for name, way in ways.items()}}


def _peak(plan: MemoryPlan) -> int:
    return plan.peak_bytes or 0


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
        if isinstance(self.settings, CompareSettings):
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

    # The work that is fixed, for its time and for what it reads from disk.
    @cached_property
    def counted(self) -> Counted:
        """Count what is sure to be done, at least: races and searches take more."""
        work = Work(passes=(CHECKED,))
        for split in self.study.splits.values():
            self._tokenise(split)
            work = sum(self._fixed(), work)
        length = float(self.report.mean())
        return Counted(self.source, work, self._at_once, length)

    def _tokenise(self, split: Splits[str]) -> None:
        """Count the tokens of the texts of a split, and of what its judge scores cuts on."""
        self.tokenizer = self.source.load_tokenizer()
        tokens = replace(self.settings.tokens, batch_size=self._at_once)
        fit, *others = (
            TokenBatches(self.tokenizer, texts, tokens, min_tokens=2)
            for texts in (split.fit, split.choose, split.report)
        )
        self.fit = np.concatenate([batch.attention_mask.sum(axis=1) for batch in fit])
        self.choose, self.report = (np.array([*map(len, one.token_ids())]) for one in others)
        self.judged = self.choose
        if self.study.judges[0] == "speech":
            halves: Any = self.study.items
            ids = prompt_ids(self.tokenizer, halves[0])
            self.judged = np.array([len(WAYS) * (len(one) + SPEECH_TOKENS) for one in ids])

    def stream(self) -> StreamPlan:
        """What is read of a model whose layers are streamed from disk, at least, about."""
        return replace(plan_passes(self.source, self.counted.work.passes), at_least=True)

    def _fixed(self) -> Iterator[Work]:
        """The whole model and its scan; the races as far as each goes; and all rows."""
        settings = self.settings
        whole, fit = self.layers, float(self.fit.sum())
        if getattr(self.study, "by_experts", False):
            yield Work(2 * whole * fit, passes=((2, fit),))  # hooks run the experts again
            yield self._losses(*[0] * (1 + len(settings.n)))
            return
        yield self._scan
        if getattr(settings, "judge", "loss") == "none":
            return
        yield self._losses(0)
        yield from self._spoken(whole)
        yield from self._raced()
        for n, state in self._rows():
            yield self._losses(n, passes=0) + self._made(n, state)
            yield from self._spoken(whole - n)
        if getattr(settings, "truth", False):
            yield self._singles(self.report[:TRUTH_ITEMS], passes=1)
        if self._answers is not None and self._answers.is_for(self.tokenizer):
            most = min(self._patch_tokens, fit)
            answers = self._answers if settings.heal else self._answers.within(most)
            yield written(whole, answers.num_written)
        if isinstance(settings, RunSettings) and not settings.plan_only:
            yield Work(loads=2, passes=((2, 0),))  # the checkpoint is saved, loaded and compared

    def _rows(self) -> list[tuple[int, str]]:
        """The sizes and states that are measured, whichever cuts coincide."""
        settings = self.settings
        if isinstance(settings, RunSettings):
            found = [
                "cut",
                *["patched"] * bool(self._patch_tokens),
                *["healed"] * bool(settings.heal),
            ]
            return [(min(self._sizes), state) for state in found]
        names, quick = self._names, settings.patch == "quick"
        alone = {"deepest", "random"} & {*names}
        cuts = len(alone) + (len(names) > len(alone))
        made = ["quick" if quick and state == "patched" else state for state in settings.states]
        return [(n, state) for n in self._sizes if n for _ in range(cuts) for state in made]

    # The parts of it.
    @cached_property
    def _names(self) -> list[str]:
        """The criteria of a table; none of a run."""
        study = self.study
        if not isinstance(study, CompareStudy) or study.settings.judge == "none":
            return []
        return [one.name for one in study.criteria]

    @property
    def _races(self) -> bool:
        """Whether proposals are raced."""
        return isinstance(self.settings, RunSettings) or RECOMMENDED in self._names

    @property
    def _at_once(self) -> int:
        """Texts of a forward."""
        return self.forward.micro_batch

    def _losses(self, *cuts: int, passes: int = 1) -> Work:
        """The losses of cuts of so many layers on the test texts."""
        left = sum(self.layers - n for n in cuts)
        return run(self.report, left, len(cuts), passes=passes)

    @property
    def _scan(self) -> Work:
        """The scan of a run, or of a table; and the states that quick patches of one solve on."""
        settings, fit = self.settings, self.fit
        if isinstance(settings, RunSettings):
            return run(fit[:SCAN_TEXTS], self.layers, passes=1)
        is_scanned = settings.judge == "none" or {*SCANNED} & {*self._names}
        scan = run(fit, self.layers, passes=1) if is_scanned else Work()
        if settings.patch == "full" or "patched" not in settings.states:
            return scan
        return scan + run(fit[: settings.num_patching], self.layers, passes=1)

    def _made(self, n: int, state: str) -> Work:
        """What makes a state of a cut of so many layers: a block in the middle."""
        fitted = min(self._patch_tokens, 7 / 8 * self.fit.sum())
        if state == "quick":
            return self._quick(n, self.settings.num_patching)
        if state == "patched":
            begin = max(1, (self.layers - n) // 2)
            layers = PatchLayers.of(self.layers, range(begin, begin + n))
            held, steps = min(MAX_HELD_OUT, self.fit.sum() / 8), most_steps(fitted)
            return patched(layers, fitted=fitted, held=held, steps=steps, each=STEP_TOKENS)
        if state == "healed" and self._recipe is not None:
            from ..healing.checks import auto_dtype, facts

            recipe = self._recipe.resolve(facts(self.config, self.layers), auto=auto_dtype())
            length, held = min(recipe.max_length, self.fit.mean()), float(self.choose.sum())
            return trained(recipe, self.layers - n, self.layers, length=length, held=held)
        return Work()

    def _quick(self, n: int, texts: int | None) -> Work:
        """A quick patch, behind the states of the whole model; it solves half as much as a full."""
        return run(self.fit[:texts], n + SOLVING / 2)

    def _spoken(self, left: int) -> Iterator[Work]:
        """How a model of so many layers speaks, judged by the whole one."""
        if self.study.prompts and not self.source.is_streamed:
            ids = prompt_ids(self.tokenizer, self.study.prompts)
            prompts = np.array([len(one) for one in ids])
            yield spoken(left, self.layers, prompts, num_tokens=SPEECH_TOKENS)

    def _raced(self) -> Iterator[Work]:
        """What proposes, and of each race all blocks on the first texts, the best patched.

        A search of a comparison judges as many.
        """
        if OneShot.name in self._names:
            yield self._singles(self.judged)
        searches = getattr(self.study, "criteria", ()) if self._names else ()
        for one in searches:
            if isinstance(one, Search) and one.judged:
                yield sum((self._screened(n, passes=0) for n in self.settings.n), Work())
        if not self._races:
            return
        sizes, top = self._sizes, self.settings.top
        if isinstance(self.settings, RunSettings) and not self.settings.target.is_none:
            sizes = [min(sizes)]
        patches = self.settings.after == "patch"
        fit = self.fit[:PATCH_TEXTS]
        proposing = run(self.fit[:PROPOSING_TEXTS], 2 * self.layers)
        yield proposing + Work(passes=(CHECKED, (3, fit.sum())))
        if patches:
            yield run(fit, self.layers)
        for n in filter(None, sizes):
            yield self._screened(n) + self._quick(n, PATCH_TEXTS) * (top * patches)

    def _singles(self, lengths: Any, passes: int = 0) -> Work:
        """Every cut of a single layer; what lies before it is run once."""
        return run(lengths, block_layers(self.layers, 1) / 2, self.layers + 1, passes=passes)

    def _screened(self, n: int, passes: int = 1) -> Work:
        """Every block of a size on the first texts; what lies before it is run once."""
        first, blocks = self.judged[: self._at_once], self.layers - n + 1
        return run(first, block_layers(self.layers, n) / 2, blocks, passes=passes)
