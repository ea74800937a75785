"""Criteria of experts: by statistics of one scan, by every set; ``n`` go of every layer."""

import math
from collections.abc import Iterable, Mapping
from itertools import combinations, product

from ...errors import ExpertsError
from ...experts.criteria import CRITERIA, WITHOUT_TEXTS, ExpertCriterion
from ...models.decoder import Decoder
from ...models.experts import find_experts, routing_of
from ...values.experts import DroppedExperts
from ...values.plan import Plan
from ..criterion import Criterion
from ..subject import Subject, parameters_share
from .similarity import shared_scan

MOST_SETS = 1_000
"""Sets of experts of which a comparison looks for the best, at most."""


class OfExperts(Criterion):
    """A criterion that chooses experts, or layers beside them, for one number at a time.

    By itself it is a row of the table of criteria by statistics of a scan.
    """

    def plans(self, subject: Subject) -> Mapping[int, Plan]:
        """Choose for each of ``subject.sizes``; an ExpertsError says why that cannot be."""
        return {n: self.plan(subject, n) for n in subject.sizes}

    def plan(self, subject: Subject, n: int) -> Plan:
        """Choose ``n`` experts of every layer that has any."""
        scanned = shared_scan(subject, experts=True)
        return scanned.plan(experts=n, criterion=self.name, seed=subject.seed)


class EverySet(OfExperts):
    """The set of experts without which the judge's score is least, of all sets."""

    name = "exhaustive"
    summary = "score of every set on the selection set"
    cost = f"all sets, {MOST_SETS:,} at most"

    def plan(self, subject: Subject, n: int) -> Plan:
        found = find_experts(subject.decoder.model, subject.decoder.layers)
        number, layers = found[0].num_experts, [one.layer for one in found]
        if not self.num_tried(subject.decoder, n):
            raise ExpertsError(
                f"there are {math.comb(number, n):,} sets for each of {len(layers)} layers, and "
                f"at most {MOST_SETS:,} sets in all are tried one by one"
            )
        routing = routing_of(subject.decoder.model, number)
        best: Plan | None = None
        least = math.inf
        for sets in product(combinations(range(number), n), repeat=len(layers)):
            dropped = DroppedExperts(number, dict(zip(layers, sets, strict=True)))
            try:
                for layer in layers:
                    routing.check(dropped.kept(layer), layer)
            except ExpertsError:
                continue  # of groups that are not alike
            plan = Plan(subject.num_layers, (), "experts", self.name, experts=dropped)
            score = subject.trials.scores(plan).mean
            if score < least:
                least, best = score, plan
        if best is None:
            raise ExpertsError(f"no set of {n} experts can go")
        return best

    def num_tried(self, decoder: Decoder, n: int) -> int:
        """Count the sets of ``n`` experts; none where they are too many to be tried."""
        found = find_experts(decoder.model, decoder.layers)
        sets = math.comb(found[0].num_experts, n) ** len(found)
        return sets if sets <= MOST_SETS else 0

    def cheap(self, decoder: Decoder, sizes: Iterable[int], *, on_disk: bool) -> list[int]:
        """The numbers for which it takes part unnamed: by few sets, of a model in memory."""
        return [n for n in sizes if not on_disk and self.num_tried(decoder, n)]


class Layers(OfExperts):
    """The block of least angular distance whose share of the parameters is nearest."""

    name = "layers"
    summary = "least angular distance; the nearest share of parameters"
    cost = "one pass"

    def plan(self, subject: Subject, n: int) -> Plan:
        scanned = shared_scan(subject, experts=True)
        share = parameters_share(subject.decoder, scanned.plan(experts=n, criterion="random"))
        blocks = [scanned.plan(size) for size in range(1, subject.num_layers)]
        return min(blocks, key=lambda one: abs(parameters_share(subject.decoder, one) - share))


def _by_statistics(name: str, row: ExpertCriterion) -> Criterion:
    """The criterion of a row, as an object of a class of its own, like every criterion."""
    paper = f" ({row.paper})" if row.paper else ""
    values = {
        "name": name,
        "summary": f"{row.what}{paper}",
        "cost": WITHOUT_TEXTS.get(row.kind, "one pass, experts twice"),
    }
    made: Criterion = type(name, (OfExperts,), values)()
    return made


OF_EXPERTS: tuple[Criterion, ...] = (
    *(_by_statistics(name, row) for name, row in CRITERIA.items()),
    EverySet(),
    Layers(),
)
"""All of them, in the order of a comparison."""
