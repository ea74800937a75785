"""What a study takes at most, before anything is loaded: texts, memory, disk and time.

The settings give the work; its speed is that of one layer with random weights (``runs.speed``).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from ..evaluation.speech import SPEECH_TOKENS
from ..judgement.bounds import verifying_forwards
from ..judgement.choosing_size import STEPS, curve_sizes, sizes_beside
from ..judgement.criteria import criteria
from ..judgement.criterion import Criterion, Search
from ..judgement.held_out_cuts import TRUTH_ITEMS
from ..judgement.judges.judge import looks
from ..judgement.proposals import PROPOSING_TEXTS
from ..judgement.subject import Subject
from ..judgement.token_states import PROBED
from ..judgement.verifying import PATCH_TEXTS
from ..memory.rehearsal import build_empty
from ..memory.streaming import StreamPlan
from ..memory.weights import num_parameters, weight_bytes
from ..models.architecture import find_layers
from ..models.decoder import Decoder
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from ..patching.descent import STEP_TOKENS, most_steps
from ..patching.memory import writer_widths
from ..patching.quick import RIDGES
from ..patching.states import MAX_HELD_OUT
from ..storage import free_bytes
from ..texts.batches import TokenBatches
from ..texts.prompts import prompt_ids
from ..values.curve import OWN_STRATEGIES, SCANNED
from ..values.estimates import Disk, Divided, Time
from ..values.forwards import Forwards
from ..values.memory import MemoryPlan
from ..values.recipe import GLOBAL_BATCH, Recipe
from ..values.settings import CompareSettings, CurveSettings, RunSettings
from ..values.speech import WAYS
from .answers import WantedAnswers
from .compare import CompareStudy
from .compare_experts import num_forwards
from .forecast import Stage, forecast_source, memory_forecast
from .recommending import SCAN_TEXTS, TABLE_REPORTS, patch_tokens
from .speed import Work, device_of, measure_speed, told
from .stream_plans import StepsPlan, StudyPasses, plan_passes, plan_steps
from .study import Study
from .verified_plans import TABLE_TEXTS, VERIFYING_TEXTS

AT_A_TIME = 4
"""A token of a text among many takes a model a quarter of the time of one alone, at most."""

DECODED = len(WAYS) * SPEECH_TOKENS / AT_A_TIME
"""Steps of one token that a model takes for a prompt."""

SOLVES = 12
"""Systems of equations that a full patch solves before each block, about."""


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
        return {**described, "time": "none, for it was measured before"}
    models = cache(
        lambda: [_Model(study, model) for model in study.models if isinstance(model, ModelSource)]
    )
    beside = "loading and tasks" if getattr(study.settings, "tasks", ()) else "loading"
    ways: dict[str, Callable[[], Any]] = {
        "memory": lambda: max((one.memory() for one in models()), key=_peak),
        "disk": lambda: Disk(max(one.disk() for one in models()), free_bytes(study.folder)),
        "time": lambda: Time(sum(one.seconds() for one in models()), beside),
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
        self.at_once = texts_at_once

    def looks(self, num_choosing: int | None = None) -> list[int]:
        """The items of each look at those that choose, or at the first of them."""
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

    # Memory and disk.
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

    def disk(self) -> int:
        """The bytes of the checkpoints and of the scan, at most."""
        settings, n = self.settings, min(self._sizes)
        if isinstance(settings, RunSettings):
            saved = (not settings.plan_only) + bool(settings.heal)
        else:  # a cut and the healed one lie there for as long as that is made and measured
            saved = 2 if self._recipe is not None else 0
        parts = [num_parameters(layer) for layer in find_layers(self.empty).modules]
        left = 1 - n * min(parts) / num_parameters(self.empty)
        samples = 8 * SCAN_TEXTS * self.layers * (self.layers + 1)
        return round(saved * weight_bytes(self.empty, str(self.source.dtype)) * left) + samples

    @property
    def _sizes(self) -> list[int]:
        """How many layers are to go; where that is not known, the sizes that are looked at."""
        settings = self.settings
        if not isinstance(settings, RunSettings):
            return list(settings.n) or [0]
        n, target = settings.target.size(self.layers), settings.target
        if n is not None:
            return [n]
        if target.max_loss is not None:
            return [size for size in STEPS if size < self.layers]
        is_knee = target.params is target.latency is target.memory is None
        return curve_sizes(self.layers) if is_knee else [1]

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
    def seconds(self) -> float:
        """The seconds that all of the work takes at most, about."""
        work = Work()
        for name in self.study.splits:
            self.texts = self._texts(name)
            work += self._work()
        lengths = self.texts.report
        at_once, length = self.texts.at_once, int(lengths.mean())
        return work.seconds(measure_speed(self.source, texts=at_once, length=length, work=work))

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
        decoded = models * DECODED * len(self.study.prompts) * (not self.source.waits_on_disk)
        if self._answers is not None:
            decoded += self._answers.num_written / AT_A_TIME
        work += Work(decoded_layers=decoded * self.layers, decoded_heads=decoded)
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
        """What is read of a model whose layers wait on disk, at most, about."""
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
                    passes += found.of_experts(*num_forwards(self.empty, self.study))
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
            reporting, choosing = num_forwards(self.empty, study)
            scanned = Work(observed=self.layers * float(texts.fit.sum())) + self._spoken
            choosing_work = _run(Forwards(self.layers, 1), texts.judged) * choosing
            return scanned + self._measured(0) * reporting + choosing_work
        work, chosen = self._measured(0) + self._spoken, study.criteria
        truth = Forwards(self.layers * (self.layers + 1) / 2, self.layers + 1)
        work += _run(truth, texts.report[:TRUTH_ITEMS])
        work += self._chosen(chosen, self.settings.n)
        work += _run(Forwards(self.layers), texts.fit)  # the states that all quick patches share
        for n in self.settings.n:
            each = self._measured(n) * 2 + self._quick(n, len(texts.fit))
            if texts.num_spoken:  # as many tokens report as choose, about
                each += _run(Forwards(self.layers - n, 1), texts.judged)
            work += each * len(chosen)
        return work

    # The parts of it.
    @property
    def _spoken(self) -> Work:
        """What the whole model says by which others are judged."""
        decoded = DECODED * self.texts.num_spoken
        return Work(decoded_layers=decoded * self.layers, decoded_heads=decoded)

    def _measured(self, n: int) -> Work:
        """The loss of a cut on the test texts."""
        return _run(Forwards(self.layers - n, 1), self.texts.report)

    def _scan(self, most: int) -> Work:
        return _run(Forwards(self.layers), self.texts.fit[:most])

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
        solved = self._solved(n, some.sum(), QUICK_SOLVES) * (self.settings.top + 3)
        return Work(found.layers, found.heads) * self.texts.judged.mean() + solved

    def _quick(self, n: int, texts: int = PATCH_TEXTS) -> Work:
        fit = self.texts.fit[:texts]
        return _run(Forwards(n), fit) + self._solved(n, fit.sum(), QUICK_SOLVES)

    def _solved(self, n: int, tokens: float, solves: float = SOLVES) -> Work:
        """A matrix before each block, about every second layer that goes ending one."""
        inputs, width = writer_widths(self.empty)
        flops = 2 * tokens * inputs * (inputs + width)
        flops += solves * (inputs**3 / 3 + 2 * inputs**2 * width)
        return Work(flops=flops * (n + 1) / 2)

    def _patched(self, n: int) -> Work:
        """A full patch: both models side by side, the losses to choose by, and the descent.

        These two begin at the first block, which lies in the middle, about.
        """
        left, fit = (self.layers - n) / 2, self.texts.fit
        fitted = min(self._patch_tokens, 7 / 8 * fit.sum())
        held = min(MAX_HELD_OUT, self._patch_tokens, fit.sum() / 8)
        steps = most_steps(fitted)
        descended = steps * min(fitted, STEP_TOKENS)
        blocks = (n + 1) / 2
        losses = Work(left, 1) * (held * (4 + blocks))
        states = Work((self.layers + 3 * blocks) * (fitted + held))
        descent = Work(
            layer_steps=descended * left, head_steps=descended, updates=float(steps * left)
        )
        return losses + states + descent + self._solved(n, 2 * (fitted + held))

    def _healed(self, n: int) -> Work:
        """A training of all layers that are left, its evaluations, and the loss afterwards."""
        assert self._recipe is not None
        from ..healing.checks import auto_dtype, facts

        recipe = self._recipe.resolve(facts(self.config, self.layers), auto=auto_dtype())
        left, length = self.layers - n, min(recipe.max_length, self.settings.max_length)
        each = recipe.max_length if recipe.packing else min(length, self.texts.fit.mean())
        tokens = recipe.steps * GLOBAL_BATCH * each
        teacher = self.layers * tokens * (recipe.objective != "lm")
        evaluated = (recipe.steps // recipe.eval_every + 2) * self.texts.choose.sum()
        trained = Work(teacher, layer_steps=tokens * left, head_steps=tokens)
        return trained + Work(left, 1) * evaluated + self._measured(n)

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


def _run(forwards: Forwards, lengths: Any) -> Work:
    """Layers and heads run on texts of some lengths."""
    return Work(forwards.layers, forwards.heads) * float(lengths.sum())
