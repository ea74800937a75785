"""Contest: what each criterion removes from one model, and what that costs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CacheError, OutputError, ShallowerError
from ..memory.weights import num_parameters
from ..models.decoder import Decoder
from ..patching.quick import QuickPatch
from ..progress import Advance
from ..values.comparison import Row
from ..values.costs import Costs
from ..values.plan import Plan
from ..values.scores import Scores
from .criterion import Criterion
from .held_out_cuts import HeldOutCuts, Store
from .stored_costs import stored_choice, stored_costs
from .subject import Subject
from .work import Work


@dataclass(frozen=True, slots=True)
class Choice:
    """The layers that a criterion would drop, and the work of finding them."""

    criterion: Criterion
    n: int
    plan: Plan
    work: Work
    tau: float | None


@dataclass
class Contest:
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

    def choices(self, advance: Advance) -> list[Choice]:
        """Let every criterion choose, for every size.

        Args:
            advance: advances by a choice.

        Returns:
            What was chosen; a criterion that cannot choose is noted in ``skipped``.
        """
        found = []
        for criterion in self.criteria:
            tau = None
            with self._others_go_on(criterion.name):
                tau = self._tau(criterion)
            for n in self.subject.sizes:
                advance(1, f"{criterion.name} {n}")
                if criterion.name not in self.skipped:
                    with self._others_go_on(f"{criterion.name}, n = {n}"):
                        found.append(Choice(criterion, n, *self._choice(criterion, n), tau))
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

    def rows(self, choices: Sequence[Choice], advance: Advance) -> Iterator[Row]:
        """Measure what was chosen, on the texts that report; regret is not known yet.

        Args:
            choices: what the criteria chose.
            advance: advances by a choice.

        Yields:
            A row for each.
        """
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
                model=self.model_name, texts=self.texts_name, criterion=choice.criterion.name,
                n=choice.n, dropped=dropped, loss=losses.mean, stderr=losses.stderr,
                difference=difference.mean, difference_stderr=difference.stderr,
                patched=None if patched is None else patched.mean,
                patched_stderr=None if patched is None else patched.stderr,
                regret=math.nan, regret_stderr=math.nan, tied=False, tau=choice.tau,
                layers_share=len(dropped) / self.subject.num_layers,
                parameters_share=float(shares[list(dropped)].sum()),
                seconds=choice.work.seconds, layer_forwards=choice.work.layer_forwards,
                score=scores.mean, score_stderr=scores.stderr,
                accuracy=held_out.scores.judge.accuracy(scores.sums),
                unpatched=found if isinstance(found, str) else None,
            )  # fmt: skip

    def _choice(self, criterion: Criterion, n: int) -> tuple[Plan, Work]:
        inputs = self._inputs(criterion)
        return stored_choice(criterion, self.subject, n, store=self.store, inputs=inputs)

    def _inputs(self, criterion: Criterion) -> dict[str, Any]:
        return {"criterion": criterion.name, "fitted": self.fitted, **self.chosen_on}

    def _tau(self, criterion: Criterion) -> float | None:
        """Kendall's τ-b of the costs of single layers with the true losses without them."""
        costs = self._costs(criterion)
        if costs is None:
            return None
        return kendall_tau(costs.blocks.diagonal(1), np.array(self.held_out.single_layers()))

    def _costs(self, criterion: Criterion) -> Costs | None:
        """The costs by a criterion, measured once; None of one that searches."""
        if type(criterion).costs is Criterion.costs:
            return None
        inputs = self._inputs(criterion)
        return stored_costs(criterion, self.subject, self.store, inputs=inputs)


def one_sentence(error: Exception) -> str:
    """Say an error in one line, with its kind where it is not one of ours."""
    kind = "" if isinstance(error, ShallowerError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def kendall_tau(costs: NDArray[np.float64], truth: NDArray[np.float64]) -> float | None:
    """Compare two orders of layers by Kendall's τ-b.

    Args:
        costs: (L,) by a criterion, NaN where it says nothing.
        truth: (L,) losses without each layer.

    Returns:
        From -1 to 1; None where fewer than two layers can be compared, or all are equal.
    """
    from scipy.stats import kendalltau

    known = np.isfinite(costs) & np.isfinite(truth)
    if known.sum() < 2:
        return None
    tau = float(kendalltau(costs[known], truth[known]).statistic)
    return tau if math.isfinite(tau) else None


def parameter_shares(decoder: Decoder) -> NDArray[np.float64]:
    """Find the parameters of every layer as a share of all of the model.

    Args:
        decoder: the model.

    Returns:
        (L,) float64.
    """
    total = num_parameters(decoder.model)
    return np.array([num_parameters(layer) / total for layer in decoder.layers.modules])


def with_regret(rows: Sequence[Row], held_out: HeldOutCuts) -> list[Row]:
    """Compare every row of one model with the best of its size.

    Args:
        rows: of one model, by any criteria and calibration texts.
        held_out: who knows the scores by item.

    Returns:
        The same rows with regret, its paired error, and whether it is a tie.
    """
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
