"""Evaluations: models before and after a cut, and two checkpoints, each measured once."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cutting.plans import NamedExperts, agreed_plan
from ..errors import TextsError
from ..models.source import ModelSource
from ..processes import check_alone
from ..settings.stages import EvalSettings
from ..storage import check_apart, check_free, check_room
from ..store.given_models import ModelStore
from ..store.inputs import inputs_of, job_of, model_content
from ..store.store import Store
from ..values.entries import recalled
from ..values.estimates import MemoryPlan, Time
from ..values.files import EVAL_FILE, SMALL
from ..values.identity import ModelIdentity
from ..values.layers import Block
from ..values.plan import Plan, key_of
from ..values.schema import read
from ..values.tokens import Tokens
from .measures import LossOfTexts, Measure, PerplexityOfText, ScoresOnTasks
from .speaking import SpeechOnPrompts

if TYPE_CHECKING:
    from ..forecasts.work import Counted
    from ..memory.streaming import StreamPlan
    from .measures import Loaded


MEASURES: Sequence[type[Measure[Any]]] = (
    LossOfTexts,
    PerplexityOfText,
    ScoresOnTasks,
    SpeechOnPrompts,
)
"""What can be measured, in the order in which it is printed."""


def items_in(settings: EvalSettings) -> dict[str, Any]:
    """What is to be measured: by the options of measures what they are of."""
    found = {one.option: getattr(settings, one.option) for one in MEASURES}
    return {option: what for option, what in found.items() if what not in (None, False)}


def measures_of(settings: EvalSettings, *, is_shared: bool) -> list[Measure[Any]]:
    """Make the measures that are asked for; TextsError if there is none."""
    asked = items_in(settings)
    if not asked:
        *others, last = (f"--{one.option}" for one in MEASURES)
        raise TextsError(f"name what to measure: {', '.join(others)} or {last}")
    wanted = [one for one in MEASURES if one.option in asked]
    return [one.of_settings(settings, is_shared=is_shared) for one in wanted]


@dataclass(frozen=True, slots=True)
class Result:
    """A result, the model that it was measured on, and when, in ISO 8601, if not just now."""

    value: Any
    model: ModelIdentity
    made: str | None = None


_ENTRY = "a measurement"

Results = Mapping[str, Mapping[str, Result]]
"""By the kind of a measure, ``base`` and, with layers, ``cut``."""


def values_and_dtype(results: Results) -> tuple[dict[str, dict[str, Any]], str]:
    """What was measured, as results are printed and written, and the dtype of the model."""
    values = {
        kind: {side: one.value for side, one in sides.items()} for kind, sides in results.items()
    }
    return values, next(one.model.dtype for sides in results.values() for one in sides.values())


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """The measures of a model before and after a cut; of experts, the blocks may be none.

    ``readings`` is what was read of streamed layers, by model. OutputError: ``out`` holds
    what is read, or another process writes there.
    """

    source: ModelSource
    measures: Sequence[Measure[Any]]
    layers: Plan | list[Block] | None = None
    experts: NamedExperts | None = None
    device_memory: str | None = None
    store: Store = field(default_factory=lambda: Store(None))
    out: Path | None = None
    overwrite: bool = False
    readings: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.file is not None:
            check_apart(self.file, [self.source.place, *(one.source for one in self.measures)])
            check_alone(self.file)
            check_room(self.file, SMALL)
        self.source.check()

    @property
    def file(self) -> Path | None:
        """The file that is written, if there is one."""
        return None if self.out is None else self.out / EVAL_FILE

    @cached_property
    def keys(self) -> dict[str, dict[str, Any] | None]:
        """What a measure's results are found by beside model and layers, by its kind."""
        assumed = {} if self.device_memory is None else {"device_memory": self.device_memory}
        is_known = self.kept.model is not None
        keys = {one.kind: one.key(self.store) if is_known else None for one in self.measures}
        return {kind: key and {**key, **assumed} for kind, key in keys.items()}

    @cached_property
    def kept(self) -> ModelStore:
        """What the store has of the model."""
        return ModelStore.of(self.source, self.store)

    @cached_property
    def content(self) -> str | None:
        """A hash of the files of the model; None where they are not known."""
        return model_content(self.source, self.store)

    @cached_property
    def job(self) -> str | None:
        """A hash of all that the results depend on but machine and places; None if not known."""
        measures = {one.kind: one.inputs(self.store) for one in self.measures}
        if None in measures.values():
            return None
        inputs = {**measures, "device_memory": self.device_memory, **key_of(self.plan)}
        return job_of(self.source, self.content, inputs)

    def find(self, measure: Measure[Any], plan: Plan | None) -> Result | None:
        """Look a result up, by what the model is without; None for the whole one."""
        key = self.keys[measure.kind]
        entry = None if key is None else self.kept.find("measurement", {**key, **key_of(plan)})
        if entry is None:
            return None
        identity = recalled(lambda known: read(ModelIdentity, known["model"]), entry.value, _ENTRY)
        return Result(recalled(measure.read, entry.value, _ENTRY), identity, entry.made)

    def keep(self, measure: Measure[Any], side: str, value: Any, *, model: ModelIdentity) -> Result:
        """Keep a result that was just measured; ``model`` is the whole one."""
        key, plan = self.keys[measure.kind], self.sides[side]
        return Result(measure.keep(self.kept, key, value, plan=plan, model=model), model)

    @cached_property
    def whole(self) -> dict[str, Result | None]:
        """The results of the whole model by kind, where they are known."""
        return {one.kind: self.find(one, None) for one in self.measures}

    @cached_property
    def plan(self) -> Plan | None:
        """The plan of the cut, checked against the number of layers; raises as ``agreed_plan``."""
        if self.layers is None:
            return None
        known = next((one.model for one in self.whole.values() if one), None)
        count = self.source.count_layers() if known is None else known.num_layers
        plan = agreed_plan(
            str(self.source.path),
            count,
            self.layers,
            experts=self.experts,
            count_experts=self.source.count_experts,
        )
        if known is not None:
            plan.check_model(known)
        return plan

    @property
    def tokens(self) -> Tokens:
        """The longest texts of all measures."""
        return max((one.tokens for one in self.measures), key=lambda tokens: tokens.max_length)

    def memory(
        self, source: ModelSource, tokens: Tokens | None = None, *, processes: int = 1
    ) -> MemoryPlan:
        """Plan the memory of the evaluation, by default of the longest texts."""
        from ..forecasts.forecast import forecast_source

        return forecast_source(
            source,
            "eval",
            tokens or self.tokens,
            device_memory=self.device_memory,
            processes=processes,
        )

    def describe(
        self, memory: MemoryPlan | None = None, others: "Sequence[EvalJob]" = ()
    ) -> dict[str, Any]:
        """Describe what the evaluation would take, of ``memory`` where that is planned already.

        The time is that of ``others``, too, which are measured after it.
        """
        from ..forecasts.forecast import memory_facts
        from ..forecasts.speed import or_unknown

        plan = memory or self.memory(self.source)
        described = {**memory_facts(self.source, plan), **self._stream()}
        if self.device_memory is None:  # else it is of a card that is not here
            described["time"] = or_unknown(lambda: self._time(plan.micro_batch, others))
        return described

    def counted(self, texts: int) -> "Counted":
        """Count the work of so many texts a forward; raises what nothing can be told of."""
        from ..forecasts.speed import Work
        from ..forecasts.work import Counted

        tokenizer, whole, work = self.source.load_tokenizer(), self.source.count_layers(), Work()
        lengths = [one.lengths(tokenizer) for one in self.measures]
        for plan in self.sides.values():
            layers = whole - len(plan.dropped if plan else ())
            for one, each in zip(self.measures, lengths, strict=True):
                work += one.work(each, layers=layers, whole=whole)
        length = max((each.mean() for each in lengths if len(each)), default=0)
        return Counted(self.source, work, texts, length)

    def _time(self, texts: int, others: "Sequence[EvalJob]") -> Time:
        from ..forecasts.work import forecast

        tasks = "tasks" if any(one.kind == "tasks" for one in self.measures) else ""
        return forecast(*[one.counted(texts) for one in (self, *others)], beside=tasks)

    def _stream(self) -> "dict[str, StreamPlan | str]":
        """Plan what speech reads where layers are streamed from disk, at most; else nothing."""
        from ..forecasts.work import CHECKED, plan_passes

        speech = [one for one in self.measures if isinstance(one, SpeechOnPrompts)]
        if not speech or not self.source.is_streamed:
            return {}
        passes = [CHECKED, (len(self.measures) * len(self.sides), 0)]
        for one in speech:  # each token of both ways, those words, and their judgement
            size = 2 * len(one.prompts) * one.tokens.max_length
            passes.append((2 * one.num_tokens + 2, size))
        try:
            return {"stream": plan_passes(self.source, passes)}
        except FileNotFoundError as error:
            return {"stream": f"cannot be estimated beforehand: {error}"}

    def known(self) -> Results | None:
        """Look for the results; None if one must be measured."""
        plan, found = self.plan, {}
        for measure in self.measures:
            sides = {"base": self.whole[measure.kind]}
            if plan:
                sides["cut"] = self.find(measure, plan)
            found[measure.kind] = {side: one for side, one in sides.items() if one}
            if len(found[measure.kind]) < len(sides):
                return None
        return found

    def check_place(self) -> None:
        """Refuse a file that is there, and not to be replaced: OutputError."""
        if self.file is not None:
            check_free(self.file, self.overwrite)

    def prepare(self) -> None:
        """Find out what is wrong with experts and measures before a model is loaded."""
        if self.plan is not None and self.plan.experts is not None:
            import torch

            from ..cutting.experts import config_left
            from ..memory.rehearsal import build_empty

            config_left(build_empty(self.source.read_config(), torch.bfloat16), self.plan)
        for measure in self.measures:
            measure.prepare()

    def measure(self) -> Results:
        """Load the model, and measure what is not known of it.

        A reference model that is another checkpoint is loaded before and after, so that only one is
        in memory. Raises PlanError for a plan of another model, and what the measures raise.
        """
        found = {
            measure.kind: {
                side: one for side, plan in self.sides.items() if (one := self.find(measure, plan))
            }
            for measure in self.measures
        }
        missing = [one for one in self.measures if len(found[one.kind]) < len(self.sides)]
        for measure in missing:
            if measure.whole is not None:
                self._take_reference(measure, self._loaded(measure.whole), measure.whole)
        identity, waiting = self._measured(missing, found)
        for measure, side, value in waiting:
            assert measure.whole is not None
            completed = measure.complete(value, self._loaded(measure.whole)[0])
            found[measure.kind][side] = self.keep(measure, side, completed, model=identity)
        return {kind: {side: some[side] for side in self.sides} for kind, some in found.items()}

    @property
    def sides(self) -> dict[str, Plan | None]:
        """The cuts that are measured, by their name; None for the whole model."""
        return {"base": None} if self.plan is None else {"base": None, "cut": self.plan}

    def _measured(
        self, missing: Sequence[Measure[Any]], found: dict[str, dict[str, Result]]
    ) -> tuple[ModelIdentity, list[tuple[Measure[Any], str, Any]]]:
        """Measure the model; what waits for another whole model comes back beside ``found``."""
        from ..cutting.in_model import without_layers

        decoder, _ = loaded = self._loaded(self.source)
        identity = decoder.identity  # as the model is before anything is cut
        if self.plan:
            with without_layers(decoder.model, self.plan):
                pass  # refused, if it is, before anything is measured
        for measure in missing:
            if measure.whole is None:
                self._take_reference(measure, loaded, self.source)
        waiting = []  # until all layers are back, or the other model is loaded
        for side, plan in self.sides.items():
            with without_layers(decoder.model, plan) if plan else nullcontext():
                for measure in missing:
                    if side in found[measure.kind]:
                        continue
                    tokens = self.fitted(measure)
                    value = measure.measure(loaded, tokens=tokens, plan=plan, store=self.kept)
                    if measure.needs_whole:
                        waiting.append((measure, side, value))
                    else:
                        found[measure.kind][side] = self.keep(measure, side, value, model=identity)
        for measure, side, value in waiting:
            if measure.whole is None:
                completed = measure.complete(value, decoder)
                kept = self.keep(measure, side, completed, model=identity)
                found[measure.kind][side] = kept
        return identity, [one for one in waiting if one[0].whole is not None]

    def _take_reference(self, measure: Measure[Any], loaded: "Loaded", source: ModelSource) -> None:
        """Let a measure see the whole model, which ``source`` names."""
        store = ModelStore.of(source, self.store)
        measure.take_reference(loaded, tokens=self.fitted(measure), store=store)

    def _loaded(self, source: ModelSource) -> "Loaded":
        """A model and its tokenizer; the memory of one before it is free."""
        from ..memory.device import free_memory
        from ..models.decoder import Decoder
        from ..models.offload import reading_of

        free_memory()
        model, tokenizer = source.load()
        if source.is_streamed:
            self.readings.append(reading_of(model))
        return Decoder.of(model), tokenizer

    def fitted(self, measure: Measure[Any]) -> Tokens:
        """Give the tokens of a measure, of as many texts in a forward as the memory holds."""
        tokens = measure.tokens
        if self.device_memory is None:
            return tokens
        planned = self.memory(self.source.resolved(), tokens)
        return Tokens(tokens.max_length, planned.micro_batch)


def paired(job: EvalJob, against: str | Path) -> tuple[EvalJob, EvalJob]:
    """Pair a job with that of another checkpoint, which it is to speak like."""
    other = replace(job, source=replace(job.source, path=against, gguf_file=None))
    measures = [
        replace(one, whole=other.source) if isinstance(one, SpeechOnPrompts) else one
        for one in job.measures
    ]
    return replace(job, measures=measures), other


def check_tokens(model: EvalJob, against: EvalJob) -> None:
    """Refuse tokenizers that read a text differently, before a model is loaded: TextsError."""
    kinds = {one.kind: one.inputs(model.store) for one in model.measures}
    sources = {"model": model.source, "against": against.source}
    is_known = None not in kinds.values()
    inputs = inputs_of(model.store, sources, {}, same_tokens=kinds) if is_known else None
    if model.store.get("measurement", inputs) is not None:
        return
    first, second = (source.load_tokenizer() for source in sources.values())
    for measure in model.measures:
        pairs = zip_longest(measure.token_ids(first), measure.token_ids(second))
        for index, (one, other) in enumerate(pairs):
            if one is None or other is None or one.tolist() != other.tolist():
                raise TextsError(
                    f"{model.source} and {against.source} have different tokenizers: "
                    f"{measure.item} {index} becomes other tokens, so their {measure.kind} cannot "
                    f"be paired by {measure.item}. Compare checkpoints of one tokenizer, or by "
                    f"--tasks, whose items are paired (--against)"
                )
    model.store.put("measurement", inputs, {"same_tokens": True})


def describe_both(*jobs: EvalJob) -> dict[str, Any]:
    """Describe what two take: the memory of that which needs more, or an unknown amount."""
    plans = [(job, job.memory(job.source)) for job in jobs]
    sizes = [math.inf if plan.peak_bytes is None else plan.peak_bytes for _, plan in plans]
    larger, memory = plans[sizes.index(max(sizes))]
    others = [job for job in jobs if job is not larger]
    loaded = f"one after the other; {larger.source} needs more memory"
    return {"loaded": loaded, **larger.describe(memory, others)}
