"""Costs and choices by a criterion, found once and kept in the store of results."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..errors import CriterionError
from ..values.costs import Costs
from ..values.entries import ResultStore
from ..values.layers import layer_count
from ..values.plan import Plan
from ..values.positions import Positions
from ..values.schema import plain, read
from .criteria import is_built_in
from .criteria.experts import OfExperts
from .criterion import Criterion
from .subject import Subject


@dataclass(slots=True)
class Took:
    """What a part of a choice took.

    Trials count as if none had been before, and a criterion without trials with all that it shares.
    """

    layer_forwards: int = 0  # layers run, times texts
    seconds: float = 0.0  # wall time, of cached results as when they were measured


@contextmanager
def _measured(subject: Subject) -> Iterator[Took]:
    """Measure the body; its work is complete when it has ended."""
    work, clock = Took(), subject.trials.clock
    started = clock()
    with subject.trials.counted() as count, subject.counting():
        yield work
    work.layer_forwards, work.seconds = count.layer_forwards or subject.ran, clock() - started


def stored_costs(
    criterion: Criterion, subject: Subject, store: ResultStore, *, inputs: Mapping[str, Any]
) -> tuple[Costs, Took]:
    """Measure the costs by a criterion, or give the cached ones, with what they took.

    ``inputs`` are all that the costs depend on beside the model. Of a criterion from outside this
    package nothing is kept.
    """
    name, kept = ("costs", criterion.name), is_built_in(criterion)
    known = store.get("costs", inputs) if kept else None
    if known is not None:
        costs = subject.shared(name, lambda: recalled_costs(known, subject))
        return costs, Took(known["layer_forwards"], known["seconds"])
    with _measured(subject) as work:
        costs = subject.shared(name, lambda: criterion.costs(subject))
    size = subject.num_layers + 1
    if not isinstance(costs, Costs) or costs.blocks.shape != (size, size):
        raise CriterionError(
            f"the criterion {criterion.name} gives no costs of {layer_count(size - 1)}: expected "
            f"costs() to give Costs of as many"
        )
    if kept:
        store.put("costs", inputs, {**recorded_costs(costs), **asdict(work)})
    return costs, work


def stored_choice(
    criterion: Criterion, subject: Subject, n: int, *, store: ResultStore, inputs: Mapping[str, Any]
) -> tuple[Plan, Took]:
    """Let a criterion choose ``n`` layers, or look that up, as :func:`stored_costs`."""
    inputs, kept = {"n": n, **inputs}, is_built_in(criterion)
    known = store.get("choice", inputs) if kept else None
    if known is not None:
        return Plan.from_json(known["plan"]), Took(known["layer_forwards"], known["seconds"])
    sized = replace(subject, sizes=(n,))
    with _measured(sized) as work:
        plans = criterion.plans(sized)
    plan = plans.get(n) if isinstance(plans, Mapping) else None
    if not isinstance(plan, Plan) or plan.num_layers != subject.num_layers:
        raise CriterionError(
            f"the criterion {criterion.name} gives no plan of {layer_count(n)}: expected plans() "
            f"to give a Plan of {subject.num_layers} layers for each of subject.sizes"
        )
    if len(plan.dropped) != n and not isinstance(criterion, OfExperts):
        raise CriterionError(
            f"the criterion {criterion.name} drops {layer_count(len(plan.dropped))}: expected {n}"
        )
    if kept:
        store.put("choice", inputs, {"plan": plan.to_json(), **asdict(work)})
    return plan, work


def recorded_costs(costs: Costs) -> dict[str, Any]:
    """Give costs, without samples, as plain JSON values."""
    return {
        "metric": costs.metric,
        "strategy": costs.strategy,
        "of_single_layers": costs.of_single_layers,
        "blocks": plain(costs.blocks.tolist()),
        "stderr": None if costs.stderr is None else plain(costs.stderr.tolist()),
        "positions": plain(costs.positions),
        "model": costs.model is not None,
        "texts": bool(costs.texts),
    }


def recalled_costs(known: Mapping[str, Any], subject: Subject) -> Costs:
    """Read costs that were recorded of the same model and texts, bit for bit."""
    blocks = np.array(known["blocks"], np.float64)
    stderr = None if known["stderr"] is None else np.array(known["stderr"], np.float64)
    options: dict[str, Any] = {
        "metric": known["metric"],
        "strategy": known["strategy"],
        "model": subject.decoder.identity if known["model"] else None,
        "texts": subject.texts if known["texts"] else (),
        "positions": read(Positions | None, known["positions"]),
    }
    if not known["of_single_layers"]:
        return Costs.of_blocks(blocks, stderr=stderr, **options)
    errors = None if stderr is None else stderr.diagonal(1)
    return Costs.of_layers(blocks.diagonal(1), stderr=errors, **options)
