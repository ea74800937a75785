"""Criteria that choose experts by statistics of a scan, and the experts that each lets go.

One table; a row says how its score is made of the sums, so that each has an error by text too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ExpertsError
from ..results.scores import Estimate
from ..values.counts import counted
from ..values.experts import DroppedExperts, Routing, check_counts
from ..values.schema import finite, plain
from .statistics import ExpertStatistics

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ExpertCriterion:
    """A score of every expert of a layer; those with the lowest go first.

    A ``total`` over tokens; a ``mean`` over them; a total of which a whole ``set`` has another than
    its experts one by one; of the ``weights``, or ``drawn``.
    """

    what: str  # the score in words
    kind: Literal["total", "mean", "set", "weights", "drawn"]
    value: str = ""  # the summed value of :class:`ExpertStatistics`
    paper: str = ""  # its source
    highest_go: bool = False  # the highest scores go first instead


CRITERIA = {
    "frequency": ExpertCriterion("tokens N", "total", "count"),
    "soft-frequency": ExpertCriterion("Σ g", "total", "gate"),
    "ean": ExpertCriterion("Σ ‖f‖", "total", "norm"),
    "man": ExpertCriterion("mean ‖f‖", "mean", "norm", "2606.15716"),
    "msan": ExpertCriterion("mean ‖f‖²", "mean", "square", "2606.15716"),
    "reap": ExpertCriterion("mean g‖f‖", "mean", "gated", "2510.13999"),
    "easy-ep": ExpertCriterion("Σ s g‖f‖", "total", "moved", "2504.06792"),
    "reconstruction": ExpertCriterion(
        "Σ ‖what they add‖², alone", "set", "gated_square", "2402.14800"
    ),
    "aimer": ExpertCriterion("mean |w| / rms w", "weights", paper="2603.18492", highest_go=True),
    "random": ExpertCriterion("drawn", "drawn"),
}
"""Every criterion of experts, by name.

``reconstruction`` is the change of the layer's output, as a squared norm summed over tokens, when a
set of experts adds nothing, the others as before: the paper's distance without its new choice among
those that stay and their new weights, which take a forward for every set.
"""

ALL_SETS = 8
"""Experts of a layer up to which ``reconstruction`` looks at every set, as its paper does."""

DEFAULT = "reap"

WITHOUT_TEXTS = {"weights": "reads the weights once", "drawn": "nothing"}
"""Kinds of criteria that read no text, and what each takes."""


def criterion_of(name: str) -> ExpertCriterion:
    """The row of a criterion; ExpertsError for an unknown name."""
    if name not in CRITERIA:
        raise ExpertsError(f"unknown criterion of experts {name!r}: expected {', '.join(CRITERIA)}")
    return CRITERIA[name]


def expert_scores(statistics: ExpertStatistics, criterion: str, seed: int = 0) -> Array:
    """The score of every expert, (M, E) float64, NaN where unknown; ``seed`` is of ``random``."""
    row = criterion_of(criterion)
    if row.kind in ("total", "set"):
        return statistics.total(row.value)
    if row.kind == "mean":
        return statistics.mean(row.value)
    if row.kind == "drawn":
        return _drawn(statistics, seed)
    if np.isnan(statistics.aimer).any():
        raise ExpertsError(
            "the scan has not seen the weights of all experts, which lay elsewhere while it ran "
            "(a device map), and aimer takes them: choose another criterion"
        )
    return statistics.aimer


def expert_stderr(statistics: ExpertStatistics, criterion: str) -> Array:
    """The standard error of every score, (M, E), by text; NaN for criteria without texts."""
    row = criterion_of(criterion)
    if row.kind in WITHOUT_TEXTS:
        return np.full(statistics.aimer.shape, np.nan)
    by_mean = row.kind == "mean"
    return (statistics.mean_stderr if by_mean else statistics.total_stderr)(row.value)


def _drawn(statistics: ExpertStatistics, seed: int) -> Array:
    """Scores by the seed and the layer alone."""
    if seed < 0:
        raise ExpertsError(f"seed {seed}: expected 0 or more")
    size = statistics.routing.num_experts
    drawn = [np.random.default_rng((seed, layer)).random(size) for layer in statistics.layers]
    return np.array(drawn)


def experts_to_drop(
    statistics: ExpertStatistics,
    count: int,
    *,
    criterion: str = DEFAULT,
    seed: int = 0,
    gone: Iterable[int] = (),
) -> DroppedExperts:
    """Choose ``count`` experts of every layer that has any: those that a criterion lets go first.

    By a criterion that reads texts an expert that no token was sent to goes before all others.
    Where a router chooses contiguous groups first, as many of each group. Of equals the smaller
    index goes. Layers that are ``gone`` whole lose no experts.
    """
    routing = statistics.routing
    _check_count(routing, count)
    together = criterion_of(criterion).kind == "set"
    scores = None if together else expert_scores(statistics, criterion, seed)
    rows = statistics.products() if scores is None else _keys(statistics, scores, criterion)
    choose = _least_together if together else _lowest
    left = set(statistics.layers) - set(gone)
    by_layer = {
        layer: choose(row, count, routing.num_groups)
        for layer, row in zip(statistics.layers, rows, strict=True)
        if layer in left
    }
    dropped = DroppedExperts(routing.num_experts, by_layer, criterion)
    for layer in dropped.by_layer:
        routing.check(dropped.kept(layer), layer)
    return dropped


@dataclass(frozen=True, slots=True)
class ChosenExperts:
    """The experts of a layer that go, and how near the next one was."""

    layer: int
    experts: tuple[int, ...]  # dropped experts, ascending
    scores: tuple[float, ...]  # of each; NaN where the criterion has none
    last: Estimate  # the score of the last to go
    next: Estimate  # of the first that stays

    def to_json(self) -> dict[str, Any]:
        """Give plain JSON values; None for what is not known."""
        return {
            "drop": list(self.experts),
            "scores": plain(self.scores),
            "next": finite(self.next.mean),
        }


def chosen_experts(
    statistics: ExpertStatistics, dropped: DroppedExperts, seed: int = 0
) -> tuple[ChosenExperts, ...]:
    """The experts that go by a criterion, with their scores, a row for each layer."""
    name = str(dropped.criterion)
    scores, stderr = expert_scores(statistics, name, seed), expert_stderr(statistics, name)
    keys = _keys(statistics, scores, name)
    rows = []
    for place, layer in enumerate(statistics.layers):
        if layer not in dropped.by_layer:
            continue
        gone, kept = list(dropped.by_layer[layer]), list(dropped.kept(layer))
        last = gone[int(np.argmax(keys[place, gone]))]
        following = kept[int(np.argmin(keys[place, kept]))]
        ends = [
            Estimate(float(scores[place, e]), float(stderr[place, e])) for e in (last, following)
        ]
        rows.append(ChosenExperts(layer, tuple(gone), tuple(scores[place, gone].tolist()), *ends))
    return tuple(rows)


def _keys(statistics: ExpertStatistics, scores: Array, criterion: str) -> Array:
    """What experts go by, the lowest first: where texts are read, those without a token."""
    row = CRITERIA[criterion]
    keys = -scores if row.highest_go else scores
    return keys if row.kind in WITHOUT_TEXTS else np.where(statistics.counts, keys, -np.inf)


def _check_count(routing: Routing, count: int) -> None:
    check_counts([count], routing.num_experts)
    if count % routing.num_groups:
        raise ExpertsError(
            f"cannot drop {counted(count, 'expert')} a layer: the router chooses among "
            f"{routing.num_groups} groups first, which must stay as large as one another, so "
            f"drop a multiple of {routing.num_groups}"
        )


def _lowest(row: Array, count: int, num_groups: int) -> tuple[int, ...]:
    """The experts of a layer with the lowest keys, as many of each group."""
    groups = row.reshape(num_groups, -1)
    order = np.argsort(groups, axis=1, kind="stable")[:, : count // num_groups]
    starts = np.arange(num_groups)[:, None] * groups.shape[1]
    return tuple(sorted((order + starts).ravel().tolist()))


def _least_together(products: Array, count: int, num_groups: int) -> tuple[int, ...]:
    """The experts of a layer that add least together, by (E, E) inner products, by group.

    The best of all sets, or one expert after the other.
    """
    size = len(products) // num_groups
    each = count // num_groups
    if len(products) <= ALL_SETS:
        parts = (combinations(range(g * size, (g + 1) * size), each) for g in range(num_groups))
        sets = [tuple(chain(*some)) for some in product(*parts)]
        return min(sets, key=lambda some: float(products[np.ix_(some, some)].sum()))
    more, groups = products.diagonal().copy(), np.arange(len(products)) // size
    gone: list[int] = []
    while len(gone) < count:
        expert = int(np.argmin(more))
        gone.append(expert)
        more += 2 * products[expert]
        more[gone] = np.inf
        if sum(groups[one] == groups[expert] for one in gone) == each:
            more[groups == groups[expert]] = np.inf
    return tuple(sorted(gone))
