"""The rows of a comparison of experts on one model: what each criterion drops, and what it costs.

Beside them stand the judge's best set, where there are few, and the block nearest in parameters.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

from transformers import PreTrainedModel

from ..cutting.in_model import without_layers
from ..errors import ExpertsError, LayersError, one_sentence
from ..judgement.held_out_cuts import judge_inputs, scores_as_it_is
from ..judgement.trials import ResultStore, Trials, recalled
from ..memory.weights import num_parameters
from ..models.experts import find_experts
from ..models.layerwise import Layerwise
from ..models.source import ModelSource
from ..progress import track
from ..scanning.expert_criteria import CRITERIA, EXHAUSTIVE, LAYERS, MOST_SETS, criterion_of
from ..scanning.model import scan
from ..scanning.scan import Scan
from ..values.comparison import Row
from ..values.experts import DroppedExperts, check_counts
from ..values.plan import Plan
from ..values.scores import Scores
from ..values.settings import CompareSettings
from .compare_rows import MeasuredRow, Outcome, with_regrets
from .given_models import InMemory
from .measuring import Measuring
from .study import Study

WITHOUT_TEXTS = ("weights", "drawn")
"""Kinds of criteria that read no text."""


def compare_experts_on(
    study: Study[CompareSettings],
    model: ModelSource | InMemory,
    *,
    criteria: Sequence[str],
    store: ResultStore,
) -> Outcome:
    """Compare criteria of experts on one model, and give the rows with their regret.

    ModelError for no routed experts or a loss that is not finite, TextsError for no text of two
    tokens.
    """
    loaded, tokenizer = study.load(model)
    number = find_experts(loaded)[0].num_experts
    check_counts(study.settings.n, number)
    measuring = Measuring(study, loaded, tokenizer, store=store)
    measured: list[MeasuredRow] = []
    skipped: dict[str, str] = {}
    for texts in study.splits:
        compared = _Choosing(study, measuring, store, criteria, model=str(model), texts=texts)
        measured += compared.measured()
        several = f" on {texts}" if len(study.splits) > 1 else ""
        skipped |= {f"{key}{several}": why for key, why in compared.skipped.items()}
    found = measuring.held_out.compared(str(model))
    counts = {name: len(getattr(measuring.split, name)) for name in ("fit", "choose")}
    return Outcome(
        replace(found, num_experts=number),
        tuple(with_regrets(measured)),
        skipped,
        {**counts, "report": measuring.judge.num_items},
        not skipped,
    )


@dataclass
class _Choosing:
    """The criteria on one model and one calibration text."""

    study: Study[CompareSettings]
    measuring: Measuring
    store: ResultStore
    criteria: Sequence[str]
    model: str
    texts: str
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        split, settings = self.study.splits[self.texts], self.study.settings
        self.fitting, started = [*split.fit], time.perf_counter()
        self.scanned: Scan = scan(
            self.measuring.model,
            self.measuring.tokenizer,
            self.fitting,
            max_length=settings.max_length,
            batch_size=settings.batch_size,
            experts=True,
            progress=self.study.progress,
        )
        self.seconds = time.perf_counter() - started
        measuring = self.measuring
        judge = measuring.judges.choosing(measuring.texts[self.texts].choose)
        self.choosing = Trials(measuring.held_out.model, judge)

    def measured(self) -> Iterator[MeasuredRow]:
        """Choose and measure, a row for each criterion and number of experts."""
        taking_part = {n: self._names(n) for n in self.study.settings.n}
        total = sum(map(len, taking_part.values()))
        with track(f"compare experts on {self.texts}", total, self.study.progress) as advance:
            for n, names in taking_part.items():
                share = 0.0
                for name in names:
                    advance(0, f"{name}, n = {n}")
                    try:
                        plan, seconds, forwards = self._choice(name, n, share)
                    except (ExpertsError, LayersError) as error:
                        self.skipped[f"{name}, n = {n}"] = one_sentence(error)
                    else:
                        row = self._row(name, n, plan, seconds=seconds, forwards=forwards)
                        share = row.row.parameters_share
                        yield row
                    advance(1)

    def _names(self, n: int) -> list[str]:
        """The criteria that are named; by default all but one that would try too many sets, each
        by a pass over layers on disk.
        """
        experts = self.scanned.experts
        sets = _num_sets(experts.routing.num_experts, n, len(experts.layers))
        few = sets <= MOST_SETS and not self.choosing.is_streamed
        all_tried = few or self.study.settings.criteria is not None
        return [name for name in self.criteria if all_tried or name != EXHAUSTIVE]

    def _choice(self, name: str, n: int, share: float) -> tuple[Plan, float, int]:
        """The plan of a criterion, its seconds and the layers that it runs, times texts."""
        layers = self.scanned.num_layers
        if name == LAYERS:
            if not share:
                drawn = self.scanned.plan(experts=n, criterion="random")
                share = self._kept(drawn)[2]
            return self._layers(share), self.seconds, layers * len(self.fitting)
        if name == EXHAUSTIVE:
            return self._exhaustive(n)
        plan = self.scanned.plan(experts=n, criterion=name, seed=self.study.settings.seed)
        if criterion_of(name).kind in WITHOUT_TEXTS:
            return plan, 0.0, 0
        return plan, self.seconds, layers * len(self.fitting)

    def _layers(self, share: float) -> Plan:
        """The block of least angular distance whose parameters are nearest to a share."""
        sizes = range(1, self.scanned.num_layers)
        plans = [self.scanned.plan(m) for m in sizes]
        return min(plans, key=lambda one: abs(self.measuring.parameters_share(one.dropped) - share))

    def _exhaustive(self, n: int) -> tuple[Plan, float, int]:
        """The best of all sets, by the judge on the selection set; ExpertsError: too many."""
        statistics = self.scanned.experts
        number, layers = statistics.routing.num_experts, statistics.layers
        count = _num_sets(number, n, len(layers))
        if count > MOST_SETS:
            raise ExpertsError(
                f"there are {math.comb(number, n):,} sets for each of {len(layers)} layers, and "
                f"at most {MOST_SETS:,} sets in all are tried one by one"
            )
        started = time.perf_counter()
        best: Plan | None = None
        least = math.inf
        for sets in product(combinations(range(number), n), repeat=len(layers)):
            dropped = DroppedExperts(number, dict(zip(layers, sets, strict=True)))
            try:
                for layer in layers:
                    statistics.routing.check(dropped.kept(layer), layer)
            except ExpertsError:
                continue  # of groups that are not alike
            plan = Plan(self.scanned.num_layers, (), experts=dropped)
            _, (scores,) = self._measured(plan, self.choosing)
            if scores.mean < least:
                least, best = scores.mean, plan
        if best is None:
            raise ExpertsError(f"no set of {n} experts can go")
        texts = sum(map(len, self.choosing.judge.batches))
        return best, time.perf_counter() - started, count * self.scanned.num_layers * texts

    def _measured(self, plan: Plan, *several: Trials) -> tuple[float, list[Scores]]:
        """The share of parameters that go by a plan, and its scores on each of several trials."""
        model, whole = self.measuring.model, self.measuring.num_parameters
        for trials in several:
            trials.prepare_together(trials.first(None))
        with without_layers(model, plan):
            share = 1 - num_parameters(model) / whole
            if plan.experts is not None:
                return share, [scores_as_it_is(Layerwise(model), one.judge) for one in several]
        return share, [trials.scores(plan.dropped) for trials in several]

    def _kept(self, plan: Plan) -> tuple[Scores, Scores, float]:
        """The judge's scores of a bare cut, its losses, and the share of parameters that go."""
        held_out = self.measuring.held_out
        inputs = {**plan.key, "items": self.study.reported, **judge_inputs(held_out.scores.judge)}
        known = self.store.get("experts_cut", inputs)
        if known is not None:
            return recalled(_read, known, "a cut of experts")
        trials = dict.fromkeys((held_out.losses, held_out.scores))  # one, where the loss judges
        share, scores = self._measured(plan, *trials)
        losses, judged = scores[0], scores[-1]
        plain = {"judged": _plain(judged), "losses": _plain(losses), "share": share}
        self.store.put("experts_cut", inputs, plain)
        return judged, losses, share

    def _row(self, name: str, n: int, plan: Plan, *, seconds: float, forwards: int) -> MeasuredRow:
        judged, losses, share = self._kept(plan)
        measuring = self.measuring
        difference = losses.minus(measuring.scores((), "cut"))
        row = Row(
            model=self.model,
            texts=self.texts,
            criterion=name,
            n=n,
            dropped=plan.dropped,
            loss=losses.mean,
            stderr=losses.stderr,
            difference=difference.mean,
            difference_stderr=difference.stderr,
            patched=None,
            patched_stderr=None,
            regret=math.nan,
            regret_stderr=math.nan,
            tied=False,
            tau=None,
            layers_share=len(plan.dropped) / self.scanned.num_layers,
            parameters_share=share,
            seconds=seconds,
            layer_forwards=forwards,
            score=judged.mean,
            score_stderr=judged.stderr,
            accuracy=measuring.held_out.scores.judge.accuracy(judged.sums),
            experts=None if plan.experts is None else str(plan.experts),
        )
        return MeasuredRow(row, judged, None)


def _num_sets(num_experts: int, n: int, num_layers: int) -> int:
    return math.comb(num_experts, n) ** num_layers


def num_forwards(model: PreTrainedModel, study: Study[CompareSettings]) -> tuple[int, int]:
    """How often a whole model runs over all test and selection texts, at most."""
    experts, settings = find_experts(model), study.settings
    names = expert_criteria(settings.criteria)
    each = 1 if settings.judge == "loss" else 2
    sets = [_num_sets(experts[0].num_experts, n, len(experts)) for n in settings.n]
    tried = sum(some for some in sets if some <= MOST_SETS) if EXHAUSTIVE in names else 0
    if settings.criteria is None and any(one.waits_on_disk for one in study.models):
        tried = 0
    return each * (1 + len(names) * len(settings.n)), tried


def _plain(scores: Scores) -> dict[str, list[float]]:
    return {"sums": scores.sums.tolist(), "weights": scores.weights.tolist()}


def _read(data: Any) -> tuple[Scores, Scores, float]:
    judged, losses = (Scores.from_json(data[name]) for name in ("judged", "losses"))
    return judged, losses, float(data["share"])


def expert_criteria(given: Sequence[Any] | None) -> tuple[str, ...]:
    """The names of the criteria that take part, all by default; ExpertsError: an unknown one."""
    table = [*CRITERIA, EXHAUSTIVE, LAYERS]
    wanted = table if given is None else [str(one) for one in given]
    unknown = [name for name in wanted if name not in table]
    if unknown or not wanted:
        raise ExpertsError(
            f"unknown criterion of experts {', '.join(map(repr, unknown))}: expected some of "
            f"{', '.join(table)} (criteria, --criteria)"
        )
    return tuple(wanted)
