"""The rows of a comparison on one model that is loaded: what each criterion drops, and its cost."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import (
    CacheError,
    OutputError,
    PatchError,
    ShallowerError,
    TextsError,
    one_sentence,
)
from ..judgement.criteria.experts import EverySet
from ..judgement.criterion import Criterion, has_costs
from ..judgement.judges.judge import Judge
from ..judgement.patched_trials import PatchedTrials, stays
from ..judgement.stored_costs import Took, stored_choice, stored_costs
from ..judgement.subject import Subject
from ..judgement.trials import ResultStore, Trials, judge_inputs, kept_trials
from ..memory.budget import limit
from ..models.decoder import Decoder
from ..models.experts import find_experts
from ..models.source import ModelSource
from ..patching.quick import QuickPatch
from ..progress import say_goes_on, stage, track
from ..store.given_models import InMemory
from ..texts.batches import TokenBatches
from ..texts.splits import FEWEST_CHOOSING, FEWEST_FITTING, FEWEST_REPORTING
from ..values.comparison import ComparedModel, Row
from ..values.experts import check_counts
from ..values.layers import check_sizes
from ..values.plan import Plan
from ..values.scores import Estimate, Scores, Standing
from ..values.settings import CompareSettings
from .measuring import Measuring
from .study import SINGLE_LAYERS, WHOLE, Part, Study


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a comparison found on one model.

    Attributes:
        model: the whole model.
        rows: every choice.
        skipped: by criterion, and calibration text where there are several, why it could not
            choose.
        splits: the number of calibration, selection and test texts: those of two tokens at least.
        is_complete: whether nothing was skipped or left out.
    """

    model: ComparedModel
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    splits: Mapping[str, int]
    is_complete: bool


def compare_on(
    study: Study[CompareSettings],
    model: ModelSource | InMemory,
    *,
    criteria: Sequence[Criterion],
    store: ResultStore,
) -> Outcome:
    """Compare criteria on one model, and give the rows with their regret.

    Raises LayersError, ExpertsError (impossible size), ModelError (layers do not run one by one, no
    routed experts, loss not finite) and TextsError (no text of two tokens).
    """
    with stage("load the model"):
        measuring = Measuring(study, *study.load(model), store=store)
    num_experts = _check_sizes(study.settings, measuring.decoder)
    measured: list[Measured] = []
    skipped: dict[str, str] = {}
    counts: dict[str, int] = {}
    is_complete = True
    for texts in study.splits:
        compared = _Choosing(study, measuring, store, criteria, model=str(model), texts=texts)
        compared.say_goes_on()
        measured += compared.measured(compared.choices())
        several = f" on {texts}" if len(study.splits) > 1 else ""
        skipped |= {f"{key}{several}": why for key, why in compared.skipped.items()}
        is_complete &= compared.is_complete
        if not counts:  # those of the first texts
            counts = compared.counts
    return Outcome(
        replace(measuring.held_out.compared(str(model)), num_experts=num_experts),
        tuple(with_regrets(measured)),
        skipped,
        {**counts, "report": measuring.judge.num_items},
        is_complete and not skipped,
    )


def _check_sizes(settings: CompareSettings, decoder: Decoder) -> int | None:
    """Refuse numbers that the model cannot lose; gives the experts of a layer, where they go."""
    if settings.unit == "layers":
        check_sizes(settings.n, len(decoder))
        return None
    number = find_experts(decoder.model, decoder.layers)[0].num_experts
    check_counts(settings.n, number)
    return number


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a criterion would drop, and the work of finding it."""

    criterion: Criterion
    n: int
    plan: Plan
    work: Took
    tau: float | None


Measured = tuple[Row, Mapping[str, Scores]]
"""A row without regrets, and by state what it is ranked by: the judge's scores of the bare cut, and
the losses of the patched one.
"""


@dataclass
class _Choosing:
    """Criteria on one model and calibration texts of one name.

    ``skipped`` holds the criteria that cannot choose here, and why; filled as they are tried.
    ``is_complete`` turns false where a cut was not patched for want of memory.
    """

    study: Study[CompareSettings]
    measuring: Measuring
    store: ResultStore
    criteria: Sequence[Criterion]
    model: str
    texts: str
    skipped: dict[str, str] = field(default_factory=dict)
    is_complete: bool = True

    def __post_init__(self) -> None:
        study, measuring, settings = self.study, self.measuring, self.study.settings
        split, fitted = measuring.texts[self.texts], study.fitted[self.texts]
        read = TokenBatches(measuring.tokenizer, split.fit, measuring.tokens, min_tokens=2)
        batches = list(read)
        judge = measuring.judges.choosing(split.choose)
        layerwise = measuring.held_out.model
        self.subject = Subject(
            measuring.decoder,
            batches,
            kept_trials(layerwise, judge, store=self.store, items=fitted),
            settings.n,
            texts=(read.identity,),
            seed=settings.seed,
        )
        self.patched: PatchedTrials | None = None  # behind experts that go nothing is patched
        if settings.unit == "layers":
            patch = QuickPatch(layerwise, batches)
            self.patched = measuring.held_out.after(patch, fitted=fitted)
        on = {"fitted": fitted, "seed": settings.seed, "unit": settings.unit}
        self._chosen_on = {**on, **judge_inputs(judge)}
        self.counts = {"fit": self.subject.num_texts, "choose": judge.num_items}
        _require_enough(self.subject, measuring.judge)

    def say_goes_on(self) -> None:
        """Say what is known of a comparison that was cut short."""
        sizes, on = self.study.settings.n, {"model": self.model, "texts": self.texts}
        names = [criterion.name for criterion in self.criteria]
        units = [self.study.unit(name, n, "cut", **on) for name in names for n in sizes]
        known, judged = sum(unit.known for unit in units), self.subject.trials.num_recalled
        if known or judged:
            where = f"{known} of {len(units)} choices and {judged:,} trials of cuts are cached"
            say_goes_on(where, self.study.progress)

    def _sizes(self, criterion: Criterion) -> Sequence[int]:
        """The sizes that a criterion chooses; by default not those with many sets to try."""
        sizes, trials = self.study.settings.n, self.subject.trials
        if self.study.settings.criteria is not None or not isinstance(criterion, EverySet):
            return sizes
        return criterion.cheap(self.subject.decoder, sizes, on_disk=trials.model.is_streamed)

    @contextmanager
    def _bar(self, name: str, trials: Trials | None = None) -> Iterator[None]:
        """Show the layers that are run to judge cuts, times texts; how many is not known."""
        trials = trials or self.subject.trials
        with track(f"{name}, layers run", show=self.study.progress) as trials.report:
            try:
                yield
            finally:
                trials.report = None

    def choices(self) -> list[_Choice]:
        """Let every criterion choose, for every size; one that cannot is noted in ``skipped``.

        Choices of experts lie by size.
        """
        found: list[_Choice] = []
        if self.study.settings.truth and any(map(has_costs, self.criteria)):
            losses, name = self.measuring.held_out.losses, "true losses without single layers"
            with (
                stage(name),
                self._bar(name, losses),
                losses.counted(),
                suppress(ShallowerError),  # every criterion that needs them says why
            ):
                self.measuring.held_out.single_layers()
        for criterion in self.criteria:
            with stage(f"choose by {criterion.name}"):
                found += self._chosen(criterion)
        return found if self.patched else sorted(found, key=lambda one: one.n)

    def _chosen(self, criterion: Criterion) -> Iterator[_Choice]:
        """Let a criterion choose for every size that it can."""
        tau, own, name = None, Took(), criterion.name
        with self._bar(name), self._others_go_on(name):
            tau, own = self._measured(criterion)
        for n in self._sizes(criterion):
            with self._bar(f"{name}, n = {n}"), self._others_go_on(f"{name}, n = {n}"):
                if name not in self.skipped:
                    yield _Choice(criterion, n, *self._choice(criterion, n, own), tau)

    @contextmanager
    def _others_go_on(self, name: str) -> Iterator[None]:
        """Note why a criterion, maybe one from outside, has failed; the others go on."""
        try:
            yield
        except (CacheError, OutputError):
            raise
        except Exception as error:
            self.skipped[name] = one_sentence(error)

    def _measured(self, criterion: Criterion) -> tuple[float | None, Took]:
        """Kendall's τ-b of layer costs with true losses, where that is asked for; the work."""
        if not has_costs(criterion):
            return None, Took()
        inputs = self._inputs(criterion)
        costs, work = stored_costs(criterion, self.subject, self.store, inputs=inputs)
        if not self.study.settings.truth:
            return None, work
        truth = np.array(self.measuring.held_out.single_layers())
        return kendall_tau(costs.blocks.diagonal(1), truth), work

    def _choice(self, criterion: Criterion, n: int, own: Took) -> tuple[Plan, Took]:
        inputs = self._inputs(criterion)
        plan, work = stored_choice(criterion, self.subject, n, store=self.store, inputs=inputs)
        self.study.keep_choice(criterion.name, n, plan, model=self.model, texts=self.texts)
        layer_forwards = own.layer_forwards or work.layer_forwards  # costs serve all sizes
        return plan, Took(layer_forwards, own.seconds + work.seconds)

    def _inputs(self, criterion: Criterion) -> dict[str, Any]:
        return {"criterion": criterion.name, **self._chosen_on}

    def measured(self, choices: Sequence[_Choice]) -> Iterator[Measured]:
        """Measure what was chosen, on the test texts."""
        measuring, held_out = self.measuring, self.measuring.held_out
        with stage("measure the whole model"):
            measuring.judge_together([choice.plan for choice in choices], self.patched)
            whole = measuring.scores(None, "cut")
        for choice in choices:
            plan = choice.plan
            with stage(f"losses of {choice.criterion.name}, n = {choice.n}", "losses of cuts"):
                judged, losses, patched, unpatched = self._scores(plan)
                speech = self._speech(plan)
            row = Row(
                model=self.model,
                texts=self.texts,
                criterion=choice.criterion.name,
                n=choice.n,
                dropped=plan.dropped,
                cut=Standing.of(losses, whole),
                patched=None if patched is None else Standing.of(patched, whole),
                tau=choice.tau,
                layers_share=len(plan.dropped) / len(measuring.decoder),
                parameters_share=measuring.parameters_share(plan),
                seconds=choice.work.seconds,
                layer_forwards=choice.work.layer_forwards,
                score=Estimate.of(judged),
                accuracy=held_out.scores.judge.accuracy(judged.sums),
                unpatched=unpatched,
                experts=None if plan.experts is None else str(plan.experts),
                **speech,
            )
            yield row, {"cut": judged} if patched is None else {"cut": judged, "patched": patched}

    def _scores(self, plan: Plan) -> tuple[Scores, Scores, Scores | None, str | None]:
        """Scores of a bare cut by its judge, its losses, and those after a patch, or why none."""
        measuring = self.measuring
        judged, losses = measuring.held_out.scores.scores(plan), measuring.scores(plan, "cut")
        if self.patched is None:
            return judged, losses, None, None
        try:
            return judged, losses, measuring.scores(plan, "quick", patched=self.patched), None
        except PatchError as error:
            self.is_complete &= stays(error)
            return judged, losses, None, str(error)

    def _speech(self, plan: Plan) -> dict[str, Estimate]:
        """How a bare cut speaks, by the names of a row's fields; nothing where it is not asked."""
        measuring = self.measuring
        speech = measuring.measure(plan, "cut").speech if measuring.speaks else None
        if speech is None:
            return {}
        return {name: Estimate.of(speech.of(name)) for name in ("acceptance", "repetition")}

    def make(self, criterion: Criterion) -> None:
        """Measure into the store what the rows of a criterion take; as much as it can be."""
        if has_costs(criterion):
            with self._others_go_on(criterion.name):
                stored_costs(criterion, self.subject, self.store, inputs=self._inputs(criterion))
        for n in self._sizes(criterion):
            with self._others_go_on(f"{criterion.name}, n = {n}"):
                if criterion.name not in self.skipped:
                    plan, _ = self._choice(criterion, n, Took())
                    self._scores(plan)
                    self._speech(plan)


class PartsMaker:
    """Measures parts of a comparison into the store; the model of the last one stays loaded."""

    def __init__(self, study: Study[CompareSettings], criteria: Sequence[Criterion]) -> None:
        self._study = study
        self._criteria = {criterion.name: criterion for criterion in criteria}
        self._models = {str(model): model for model in study.models}
        self._open: dict[tuple[str, str], _Choosing] = {}

    def __call__(self, part: Part[CompareSettings]) -> None:
        """Measure a part."""
        with limit(self._study.settings.device_memory):
            opened = self._opened(part)
            held_out = opened.measuring.held_out
            if part.what == WHOLE:
                held_out.compared(part.model)
            elif part.what == SINGLE_LAYERS:
                with suppress(ShallowerError):  # every criterion that needs them says why
                    held_out.single_layers()
            else:
                opened.make(self._criteria[part.what])

    def _opened(self, part: Part[CompareSettings]) -> _Choosing:
        key = part.model, part.texts
        if key not in self._open:
            same = [one.measuring for (model, _), one in self._open.items() if model == part.model]
            self._open.clear()
            study, store = self._study, self._study.model_store(self._models[part.model])
            if not same:
                loaded = study.load(self._models[part.model])
                same = [Measuring(study, *loaded, store=store)]
            _check_sizes(study.settings, same[0].decoder)
            self._open[key] = _Choosing(
                study,
                same[0],
                store,
                list(self._criteria.values()),
                model=part.model,
                texts=part.texts,
            )
        return self._open[key]


def _require_enough(subject: Subject, report: Judge) -> None:
    """Refuse sets that are too small without their texts of a single token."""
    sets = (
        (subject.num_texts, FEWEST_FITTING, "calibration", "--texts, --max-texts"),
        (subject.trials.judge.num_items, FEWEST_CHOOSING, "selection", "--texts, --max-texts"),
        (report.num_items, FEWEST_REPORTING, "test", "--eval-texts, --max-eval-texts"),
    )
    for number, fewest, name, options in sets:
        if number < fewest:
            raise TextsError(
                f"too few {name} texts: {number} of at least two tokens, expected {fewest}; "
                f"give more, or longer ones ({options}, --max-length)"
            )


def kendall_tau(costs: NDArray[np.float64], truth: NDArray[np.float64]) -> float | None:
    """Kendall's τ-b of costs by a criterion, (L,), NaN where it says nothing, and true losses.

    None where fewer than two layers can be compared, or all are equal.
    """
    from scipy.stats import kendalltau

    known = np.isfinite(costs) & np.isfinite(truth)
    if known.sum() < 2:
        return None
    tau = float(kendalltau(costs[known], truth[known]).statistic)
    return tau if math.isfinite(tau) else None


def with_regrets(measured: Sequence[Measured]) -> Iterator[Row]:
    """Compare every row of one model with the least mean of its size in each state, paired."""
    best: dict[tuple[int, str], Scores] = {}
    for row, scores in measured:
        for state, one in scores.items():
            key = row.n, state
            if key not in best or one.mean < best[key].mean:
                best[key] = one
    for row, scores in measured:
        regrets = {state: one.minus(best[row.n, state]) for state, one in scores.items()}
        standings = {
            state: replace(getattr(row, state), regret=Estimate.of(regret))
            for state, regret in regrets.items()
        }
        yield replace(row, **standings)
