"""The rows of a comparison on one model that is loaded: what each criterion drops, and its cost."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import (
    CacheError,
    OutputError,
    ScanError,
    ShallowerError,
    TextsError,
    one_sentence,
    others_go_on,
)
from ..forecasts.gain import GAIN_DEVICE, gain
from ..judgement.criteria import RecommendedPlan
from ..judgement.criteria.experts import EverySet
from ..judgement.criteria.similarity import shared_scan
from ..judgement.criterion import Criterion, has_costs
from ..judgement.judges.judge import Judge
from ..judgement.stored_costs import Took, stored_choice, stored_costs
from ..judgement.subject import Subject
from ..judgement.trials import Trials, judge_inputs, kept_trials
from ..memory.budget import limit
from ..models.decoder import Decoder
from ..models.experts import find_experts
from ..models.source import ModelSource
from ..progress import say_goes_on, stage, track
from ..results.comparison import (
    ComparedModel,
    MeasuredRow,
    Row,
    Start,
    scan_place,
    with_regrets,
)
from ..results.loss import Loss
from ..results.scores import Estimate, Scores, Standing
from ..scanning.scan import Scan
from ..settings.recipe import Recipe
from ..settings.studies import CompareSettings, State
from ..store.given_models import InMemory
from ..texts.splits import FEWEST_CHOOSING, FEWEST_FITTING, FEWEST_REPORTING
from ..values.costs import NUM_RESAMPLES, BootstrappedStart
from ..values.entries import ResultStore
from ..values.experts import check_counts
from ..values.layers import check_sizes
from ..values.plan import Gone, Plan
from .measures import ScoresOnTasks
from .measuring import Measured, Measuring
from .study import SINGLE_LAYERS, WHOLE, Part, Study
from .verified_plans import VerifiedPlans


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a comparison found on one model.

    ``skipped`` says by criterion why it could not choose; ``splits`` counts the calibration,
    selection and test texts of two tokens at least; ``is_complete`` says that nothing was left out.
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
    tasks: ScoresOnTasks | None,
    store: ResultStore,
    write: Callable[[Outcome], None],
) -> Outcome:
    """Compare criteria on one model, and give the rows with their regret.

    ``write`` gets those known so far before each next measurement. Raises LayersError, ExpertsError
    (impossible size), ModelError (layers do not run one by one, no routed experts, loss not
    finite), RecipeError (it cannot be healed) and TextsError (no text of two tokens).
    """
    with stage("load the model"):
        measuring = open_measuring(study, model, tasks=tasks, store=store)
    num_experts = _check_sizes(study.settings, measuring.decoder)
    measured: list[MeasuredRow] = []
    skipped: dict[str, str] = {}
    counts: dict[str, int] = {}
    starts: dict[str, tuple[Start, ...]] = {}
    is_complete = True

    def outcome(compared: _Choosing) -> Outcome:
        return Outcome(
            replace(compared.whole_model(str(model)), num_experts=num_experts, starts=dict(starts)),
            tuple(with_regrets(measured)),
            skipped,
            {**counts, "report": measuring.judge.num_items},
            is_complete and compared.is_complete and not skipped,
        )

    for texts in study.splits:
        compared = _Choosing(study, measuring, store, criteria, model=str(model), texts=texts)
        compared.say_goes_on()
        counts = counts or compared.counts  # those of the first texts
        if wants_scans(study):
            with stage("scan"):
                starts[texts] = compared.starts()
        if study.settings.judge == "none":
            found = outcome(compared)
            continue
        choices = compared.choices()
        several = f" on {texts}" if len(study.splits) > 1 else ""
        skipped |= {f"{key}{several}": why for key, why in compared.skipped.items()}
        for one in compared.measured(choices):
            measured.append(one)
            write(outcome(compared))
        found = outcome(compared)
        is_complete = found.is_complete
    return found


def open_measuring(
    study: Study[CompareSettings],
    model: ModelSource | InMemory,
    *,
    tasks: ScoresOnTasks | None,
    store: ResultStore,
) -> Measuring:
    """Load a model of a study to measure its cuts; what it is trained by is refused before."""
    _ = study.splits  # what is wrong there, and with the tasks, is said before the loading
    if tasks is not None:
        tasks.prepare()
    loaded, tokenizer = study.load(model)
    recipe = _recipe(study, loaded, tokenizer)
    return Measuring(study, loaded, tokenizer, store=store, tasks=tasks, recipe=recipe)


def _recipe(study: Study[CompareSettings], model: Any, tokenizer: Any) -> Recipe | None:
    """The settings of a healing, which is refused before any work where it cannot be."""
    settings = study.settings
    if "healed" not in settings.states:
        return None
    from ..healing.checks import require_healable
    from .healing_stage import choose_recipe

    recipe = settings.heal or choose_recipe(model, settings.heal_steps, settings.seed)
    require_healable(model, tokenizer, study.training_texts(), recipe=recipe)
    return recipe


def _check_sizes(settings: CompareSettings, decoder: Decoder) -> int | None:
    """Refuse numbers that the model cannot lose; gives the experts of a layer, where they go."""
    if settings.unit == "layers":
        check_sizes(settings.n, len(decoder))
        return None
    number = find_experts(decoder.model, decoder.layers)[0].num_experts
    check_counts(settings.n, number)
    return number


@dataclass
class _Choosing:
    """Criteria on one model and calibration texts of one name.

    ``skipped`` holds the criteria that cannot choose here, and why; filled as they are tried.
    ``is_complete`` turns false where a failure, as for want of memory, may not recur.
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
        measuring, settings = self.measuring, self.study.settings
        self.on = on = measuring.calibrated(self.texts)
        judge = measuring.choosing(on.split.choose)
        self.subject = Subject(
            measuring.decoder,
            on.batches,
            kept_trials(measuring.held_out.model, judge, store=self.store, items=on.fitted),
            settings.n,
            texts=(on.identity,),
            seed=settings.seed,
            store=self.store,
        )
        where = {"fitted": on.fitted, "seed": settings.seed, "unit": settings.unit}
        self._chosen_on = {**where, **judge_inputs(judge)}
        self.counts = {"fit": self.subject.num_texts, "choose": judge.num_items}
        self._time_shares: dict[Gone, float | None] = {}
        _require_enough(self.subject, measuring.judge)

    @cached_property
    def plans(self) -> VerifiedPlans:
        """The verified plan of every size."""
        return self.measuring.plans(lambda: shared_scan(self.subject), self.texts)

    def starts(self) -> tuple[Start, ...]:
        """Where the most alike blocks start; the scan is put below the folder of the study."""
        with self.subject.counting():
            scanned = shared_scan(self.subject)
        if self.study.out is not None:
            scanned.save(self.study.folder / scan_place(self.model, self.texts))
        return starts_of(scanned)

    def say_goes_on(self) -> None:
        """Say what is known of a comparison that was cut short."""
        if judged := self.subject.trials.num_recalled:
            say_goes_on(f"{judged:,} trials of cuts are cached", self.study.progress)

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

    def choices(self) -> list[tuple[Row, Plan]]:
        """Let every criterion choose, for every size; one that cannot is noted in ``skipped``.

        Gives the row of each plan before that is measured.

        Choices of experts lie by size.
        """
        found: list[tuple[Row, Plan]] = []
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
        if self.study.settings.unit == "layers":
            return found
        return sorted(found, key=lambda one: one[0].n)

    def _chosen(self, criterion: Criterion) -> Iterator[tuple[Row, Plan]]:
        """Let a criterion choose for every size that it can."""
        tau, own, name = None, Took(), criterion.name
        bar = nullcontext if isinstance(criterion, RecommendedPlan) else self._bar  # it has its own
        with bar(name), others_go_on(name, self.skipped):
            tau, own = self._measured(criterion)
        for n in self._sizes(criterion):
            with bar(f"{name}, n = {n}"), others_go_on(f"{name}, n = {n}", self.skipped):
                if name not in self.skipped:
                    plan, work = self._choice(criterion, n, own)
                    yield self._row(name, n, plan, work, tau), plan

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
        if isinstance(criterion, RecommendedPlan):
            with self.subject.counting():  # of the scan, which others share
                verified = self.plans.verify(n)
            plan, took = verified.plan, Took(verified.layer_forwards, verified.seconds)
        else:
            inputs = self._inputs(criterion)
            plan, work = stored_choice(criterion, self.subject, n, store=self.store, inputs=inputs)
            layer_forwards = own.layer_forwards or work.layer_forwards  # costs serve all sizes
            took = Took(layer_forwards, own.seconds + work.seconds)
        return plan, took

    def _inputs(self, criterion: Criterion) -> dict[str, Any]:
        return {"criterion": criterion.name, **self._chosen_on}

    def measured(self, choices: Sequence[tuple[Row, Plan]]) -> Iterator[MeasuredRow]:
        """Measure what was chosen in every state, on the test texts."""
        measuring, settings = self.measuring, self.study.settings
        quick = settings.patch == "quick" and "patched" in settings.states
        with stage("measure the whole model"):
            plans = [plan for _, plan in choices]
            measuring.judge_together(plans, self.on.patched if quick else None)
            measuring.measure(None, "cut", self.on)
        for state, (row, plan) in product(settings.states, choices):
            with stage(f"{row.criterion}, n = {row.n}, {state}", f"measure {state}"):
                share = self._time_share(plan)
                found = self._measured_in(replace(row, state=state, time_share=share), plan)
            yield found

    def _row(self, criterion: str, n: int, plan: Plan, work: Took, tau: float | None) -> Row:
        """The row of a choice before it is measured."""
        return Row(
            model=self.model,
            texts=self.texts,
            criterion=criterion,
            n=n,
            state="cut",
            dropped=plan.dropped,
            standing=None,
            tau=tau,
            layers_share=len(plan.dropped) / len(self.measuring.decoder),
            parameters_share=self.measuring.parameters_share(plan),
            time_share=None,
            layer_forwards=work.layer_forwards,
            choice_seconds=work.seconds,
            experts=None if plan.experts is None else str(plan.experts),
        )

    def _measured_in(self, row: Row, plan: Plan) -> MeasuredRow:
        """Measure a cut in the state of its row; what cannot be says so in ``failed``."""
        try:
            found, judged = self._measure(plan, row.state)
            whole = self.measuring.measure(None, "cut", self.on).loss
            losses = _by_text(found.loss)
        except (CacheError, OutputError):
            raise
        except Exception as error:
            lacks = isinstance(error.__cause__, torch.OutOfMemoryError)
            self.is_complete &= isinstance(error, ShallowerError) and not lacks
            return replace(row, failed=one_sentence(error)), None
        standing = Standing.of(losses, _by_text(whole))
        more: Any = {"tasks": found.tasks, "speech": found.speech, "seconds": found.seconds}
        scores = judged.pop("scores", losses)
        return replace(row, standing=standing, **more, **judged), scores

    def _measure(self, plan: Plan, state: State) -> tuple[Measured, dict[str, Any]]:
        """Measure a cut in a state; a bare one is judged, too."""
        found = self.measuring.measure(plan, state, self.on)
        return found, self._judged(plan) if state == "cut" else {}

    def _judged(self, plan: Plan) -> dict[str, Any]:
        """Score a bare cut by its judge: the scores, and the fields of a row."""
        trials = self.measuring.held_out.scores
        scores = trials.scores(plan)
        accuracy = trials.judge.accuracy(scores.sums)
        return {"scores": scores, "score": Estimate.of(scores), "accuracy": accuracy}

    def _time_share(self, plan: Plan) -> float | None:
        """The share of a token's time that is saved; None where no config can tell it."""
        if plan.gone not in self._time_shares:
            try:
                found = gain(self.measuring.model, plan, device=GAIN_DEVICE).on(GAIN_DEVICE)
                self._time_shares[plan.gone] = 1 - found.decode_ratio
            except ShallowerError:
                self._time_shares[plan.gone] = None
        return self._time_shares[plan.gone]

    def whole_model(self, name: str) -> ComparedModel:
        """The whole model, which has that name; by the judge ``none`` it is not measured."""
        if self.study.settings.judge == "none":
            return self.measuring.held_out.described(name)
        whole = self.measuring.measure(None, "cut", self.on)
        compared = self.measuring.held_out.compared(name)
        return replace(compared, tasks=whole.tasks, speech=whole.speech)

    def make(self, criterion: Criterion) -> None:
        """Measure into the store what the rows of a criterion take; as much as it can be."""
        if has_costs(criterion):
            with others_go_on(criterion.name, self.skipped):
                stored_costs(criterion, self.subject, self.store, inputs=self._inputs(criterion))
        for n in self._sizes(criterion):
            with others_go_on(f"{criterion.name}, n = {n}", self.skipped):
                if criterion.name not in self.skipped:
                    plan, _ = self._choice(criterion, n, Took())
                    for state in self.study.settings.states:
                        with others_go_on(f"{criterion.name}, n = {n}, {state}", self.skipped):
                            self._measure(plan, state)


def _by_text(loss: Loss) -> Scores:
    assert loss.by_text is not None
    return loss.by_text


def parts_maker(
    study: Study[CompareSettings], criteria: Sequence[Criterion], tasks: ScoresOnTasks | None
) -> Callable[[Part], None]:
    """Give the function that measures a part into the store; the last one's model stays loaded."""
    named = {criterion.name: criterion for criterion in criteria}
    models = {str(model): model for model in study.models}
    opened: dict[tuple[str, str], _Choosing] = {}

    def choosing(part: Part) -> _Choosing:
        key = part.model, part.texts
        if key not in opened:
            same = [one.measuring for (model, _), one in opened.items() if model == part.model]
            opened.clear()
            model = models[part.model]
            store = study.model_store(model)
            measuring = same[0] if same else open_measuring(study, model, tasks=tasks, store=store)
            _check_sizes(study.settings, measuring.decoder)
            opened[key] = _Choosing(study, measuring, store, criteria, *key)
        return opened[key]

    def make(part: Part) -> None:
        with limit(study.settings.device_memory):
            on = choosing(part)
            if part.what == WHOLE:
                on.whole_model(part.model)
                if wants_scans(study):
                    on.starts()
            elif part.what == SINGLE_LAYERS:
                with suppress(ShallowerError):  # every criterion that needs them says why
                    on.measuring.held_out.single_layers()
            else:
                on.make(named[part.what])

    return make


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


def wants_scans(study: Study[CompareSettings]) -> bool:
    """Whether layers are compared: for a page of several models or texts, or nothing else."""
    several = len(study.models) * len(study.named_texts) > 1
    return study.settings.unit == "layers" and (several or study.settings.judge == "none")


def starts_of(scan: Scan) -> tuple[Start, ...]:
    """The best start of every size; its spread where there are enough samples."""
    try:
        resampled = scan.bootstrap(NUM_RESAMPLES, metric="angular")
    except ScanError:  # it has too few samples
        resampled = {}
    return tuple(
        _start(n, scan.best_block(n, "angular").start, resampled.get(n))
        for n in range(1, scan.num_layers)
    )


def _start(n: int, start: int, resampled: BootstrappedStart | None) -> Start:
    if resampled is None:
        return Start(n, start, None, None)
    places = np.arange(len(resampled.distribution))
    mean = float(resampled.distribution @ places)
    spread = math.sqrt(float(resampled.distribution @ (places - mean) ** 2))
    return Start(n, start, resampled.probability, spread)
