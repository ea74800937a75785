"""The comparison of criteria on one model that is loaded: what each drops, and what that costs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..errors import CacheError, OutputError, TextsError, one_sentence
from ..evaluation.loss import fitting_tokens
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..progress import Advance, track
from ..texts.batches import TokenBatches
from ..texts.options import OptionItem
from ..texts.splits import FEWEST_CHOOSING, FEWEST_FITTING, FEWEST_REPORTING, Splits
from ..values.comparison import ComparedModel, Row
from ..values.layers import check_sizes
from ..values.plan import Plan
from ..values.scores import Scores
from ..values.tokens import Tokens
from .criterion import Criterion
from .held_out_cuts import HeldOutCuts, judge_inputs
from .judges import judge_of
from .judges.judge import Judge, LossJudge, judged_batches
from .stored_costs import Work, stored_choice, stored_costs
from .subject import Subject
from .trials import Store, Trials


@dataclass(frozen=True)
class Terms:
    """What is compared, on which texts.

    Attributes:
        criteria: those that take part.
        sizes: how many layers go, ascending.
        texts: the three sets of texts by the name of the calibration texts; all report the same.
        identities: by the same names what tells these texts from others, for the store.
        reported: the same of the texts that report.
        judge: name of the judge that chooses.
        choosing: items of a task that choose, of the judge ``options``.
        reporting: those that report.
        tokens: length of texts, and how many make one forward.
        seed: of whatever is drawn.
        progress: bars with ETA on standard error; by default if that is a terminal.
    """

    criteria: Sequence[Criterion]
    sizes: Sequence[int]
    texts: Mapping[str, Splits]
    identities: Mapping[str, str]
    reported: str
    judge: str = "loss"
    choosing: Sequence[OptionItem] = ()
    reporting: Sequence[OptionItem] = ()
    tokens: Tokens = field(default_factory=Tokens)
    seed: int = 0
    progress: bool | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a comparison found on one model.

    Attributes:
        model: the whole model.
        rows: every choice.
        skipped: by criterion, and calibration text where there are several, why it could not
            choose.
        splits: how many texts fit, choose and report: those of two tokens at least.
        is_complete: whether nothing was skipped or left out.
    """

    model: ComparedModel
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    splits: Mapping[str, int]
    is_complete: bool


def compare_on(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    terms: Terms,
    *,
    name: str,
    store: Store,
) -> Outcome:
    """Compare criteria on one model of that name, and give the rows with their regret.

    Raises:
        LayersError: a size that the model cannot lose.
        ModelError: its layers cannot be run one by one, or a loss is not finite.
        TextsError: no text has two tokens.
    """
    check_sizes(terms.sizes, len(decoder))
    tokens = fitting_tokens(decoder, terms.tokens)
    model = Layerwise(decoder)
    report = next(iter(terms.texts.values())).report
    losses = LossJudge(judged_batches(tokenizer, report, tokens))
    model.check(losses.batches[0])
    judge: Judge = losses
    if terms.judge != "loss":
        judge = judge_of(terms.judge, tokenizer, report, items=terms.reporting, tokens=tokens)
    held_out = HeldOutCuts(
        model, losses, judge, store=store, texts=terms.reported,
        num_rejected=len(report) - losses.num_items,
    )  # fmt: skip
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    counts: dict[str, int] = {}
    for texts in terms.texts:
        subject = _subject(model, tokenizer, terms, tokens=tokens, store=store, texts=texts)
        _require_enough(subject, losses)
        compared = _CriteriaOnTexts(
            subject, terms.criteria, held_out, QuickPatch(model, subject.batches), store,
            model_name=name, texts_name=texts, fitted=terms.identities[texts],
            chosen_on={"seed": terms.seed, **judge_inputs(subject.trials.judge)},
        )  # fmt: skip
        with track(f"compare on {texts}", compared.steps, terms.progress) as advance:
            rows += compared.rows(compared.choices(advance), advance)
        several = f" on {texts}" if len(terms.texts) > 1 else ""
        skipped |= {f"{key}{several}": why for key, why in compared.skipped.items()}
        if not counts:  # what is said once is said of the first texts
            counts = {"fit": subject.num_texts, "choose": subject.trials.judge.num_items}
    return Outcome(
        held_out.compared(name),
        tuple(with_regret(rows, held_out)),
        skipped,
        {**counts, "report": losses.num_items},
        held_out.is_complete and not skipped,
    )


def _require_enough(subject: Subject, report: Judge) -> None:
    """Refuse sets that are too small without their texts of a single token."""
    sets = (
        (subject.num_texts, FEWEST_FITTING, "to fit", "--texts, --max-texts"),
        (subject.trials.judge.num_items, FEWEST_CHOOSING, "to choose", "--texts, --max-texts"),
        (report.num_items, FEWEST_REPORTING, "to report", "--eval-texts, --max-eval-texts"),
    )
    for number, fewest, purpose, options in sets:
        if number < fewest:
            raise TextsError(
                f"too few texts {purpose}: {number} of at least two tokens, expected {fewest}; "
                f"give more, or longer ones ({options}, --max-length)"
            )


def _subject(
    model: Layerwise,
    tokenizer: PreTrainedTokenizerBase,
    terms: Terms,
    *,
    tokens: Tokens,
    store: Store,
    texts: str,
) -> Subject:
    """The model on the texts of one name that fit and that choose."""
    splits = terms.texts[texts]
    fitted = TokenBatches(tokenizer, splits.fit, tokens, min_tokens=2)
    batches = list(fitted)
    judge = judge_of(terms.judge, tokenizer, splits.choose, items=terms.choosing, tokens=tokens)
    journal = store.journal("trials", {"items": terms.identities[texts], **judge_inputs(judge)})
    trials = Trials(model, judge, journal=journal)
    return Subject(
        model.head.decoder,
        batches,
        trials,
        terms.sizes,
        texts=(fitted.identity,),
        seed=terms.seed,
        progress=False,
    )


@dataclass(frozen=True, slots=True)
class _Choice:
    """The layers that a criterion would drop, and the work of finding them."""

    criterion: Criterion
    n: int
    plan: Plan
    work: Work
    tau: float | None


@dataclass
class _CriteriaOnTexts:
    """Criteria on one model and one calibration text.

    Attributes:
        subject: the model, the texts that fit and those that choose.
        criteria: those that are compared.
        held_out: the same model on the texts that report.
        patch: the quick patch on the texts that fit.
        store: results that were measured before.
        model_name: for the rows.
        texts_name: for the rows.
        fitted: identity of the texts that fit, for the store.
        chosen_on: identity of the items that choose, and what else a choice depends on.
        skipped: the criteria that cannot choose here, and why; filled as they are tried.
    """

    subject: Subject
    criteria: Sequence[Criterion]
    held_out: HeldOutCuts
    patch: QuickPatch
    store: Store
    model_name: str
    texts_name: str
    fitted: str
    chosen_on: Mapping[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of the progress: every choice, and the losses of what it chose."""
        return 2 * len(self.criteria) * len(self.subject.sizes)

    def choices(self, advance: Advance) -> list[_Choice]:
        """Let every criterion choose, for every size; one that cannot is noted in ``skipped``."""
        found = []
        for criterion in self.criteria:
            tau, own = None, Work()
            with self._others_go_on(criterion.name):
                tau, own = self._measured(criterion)
            for n in self.subject.sizes:
                advance(1, f"{criterion.name} {n}")
                if criterion.name not in self.skipped:
                    with self._others_go_on(f"{criterion.name}, n = {n}"):
                        found.append(_Choice(criterion, n, *self._choice(criterion, n, own), tau))
        return found

    @contextmanager
    def _others_go_on(self, name: str) -> Iterator[None]:
        """Note why a criterion, maybe one from outside, has failed; the others go on."""
        try:
            yield
        except (CacheError, OutputError):
            raise
        except Exception as error:
            self.skipped[name] = one_sentence(error)

    def rows(self, choices: Sequence[_Choice], advance: Advance) -> Iterator[Row]:
        """Measure what was chosen, on the texts that report; regret is not known yet."""
        held_out, whole = self.held_out, self.held_out.losses.scores(())
        shares = parameter_shares(self.subject.decoder)
        for choice in choices:
            dropped = choice.plan.dropped
            advance(1, f"loss of {choice.criterion.name} {choice.n}")
            scores, losses = held_out.scores.scores(dropped), held_out.losses.scores(dropped)
            found = held_out.patched(self.patch, choice.plan, fitted=self.fitted)
            patched = found if isinstance(found, Scores) else None
            difference = losses.minus(whole)
            yield Row(
                model=self.model_name,
                texts=self.texts_name,
                criterion=choice.criterion.name,
                n=choice.n,
                dropped=dropped,
                loss=losses.mean,
                stderr=losses.stderr,
                difference=difference.mean,
                difference_stderr=difference.stderr,
                patched=None if patched is None else patched.mean,
                patched_stderr=None if patched is None else patched.stderr,
                regret=math.nan,
                regret_stderr=math.nan,
                tied=False,
                tau=choice.tau,
                layers_share=len(dropped) / self.subject.num_layers,
                parameters_share=float(shares[list(dropped)].sum()),
                seconds=choice.work.seconds,
                layer_forwards=choice.work.layer_forwards,
                score=scores.mean,
                score_stderr=scores.stderr,
                accuracy=held_out.scores.judge.accuracy(scores.sums),
                unpatched=found if isinstance(found, str) else None,
            )

    def _measured(self, criterion: Criterion) -> tuple[float | None, Work]:
        """Kendall's τ-b of the costs of single layers with the true losses without them.

        And what the criterion takes for all sizes together; τ is None of one that searches.
        """
        passes = criterion.layer_forwards(self.subject)
        if type(criterion).costs is Criterion.costs:
            return None, Work(passes)
        inputs = self._inputs(criterion)
        costs, work = stored_costs(criterion, self.subject, self.store, inputs=inputs)
        tau = kendall_tau(costs.blocks.diagonal(1), np.array(self.held_out.single_layers()))
        return tau, Work(passes + work.layer_forwards, work.seconds)

    def _choice(self, criterion: Criterion, n: int, own: Work) -> tuple[Plan, Work]:
        inputs = self._inputs(criterion)
        plan, work = stored_choice(criterion, self.subject, n, store=self.store, inputs=inputs)
        layer_forwards = own.layer_forwards + work.layer_forwards
        return plan, Work(layer_forwards, own.seconds + work.seconds)

    def _inputs(self, criterion: Criterion) -> dict[str, Any]:
        return {"criterion": criterion.name, "fitted": self.fitted, **self.chosen_on}


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


def parameter_shares(decoder: Decoder) -> NDArray[np.float64]:
    """The parameters of every layer as a share of all of the model, (L,)."""
    total = num_parameters(decoder.model)
    return np.array([num_parameters(layer) / total for layer in decoder.layers.modules])


def with_regret(rows: Sequence[Row], held_out: HeldOutCuts) -> list[Row]:
    """Compare every row of one model with the best of its size: regret, its error, and ties."""
    best: dict[int, Row] = {}
    for row in rows:
        if row.n not in best or row.score < best[row.n].score:
            best[row.n] = row
    found = []
    for row in rows:
        scores = held_out.scores.scores(row.dropped)
        regret = scores.minus(held_out.scores.scores(best[row.n].dropped))
        stderr = regret.stderr if row.dropped != best[row.n].dropped else 0.0
        found.append(replace(row, regret=regret.mean, regret_stderr=stderr, tied=regret.tied))
    return found
