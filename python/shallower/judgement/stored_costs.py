"""Costs and choices by a criterion, found once and kept in the store of results."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CriterionError
from ..values.costs import Costs
from ..values.plan import Plan
from ..values.positions import Positions
from ..values.schema import read
from .criteria import is_built_in
from .criterion import Criterion
from .held_out_cuts import Store
from .subject import Subject
from .work import Work


def stored_costs(
    criterion: Criterion, subject: Subject, store: Store, *, inputs: Mapping[str, Any]
) -> Costs:
    """Measure the costs by a criterion, or give what was measured before.

    Args:
        criterion: one that has costs; of those of others than this package nothing is kept.
        subject: the model and its texts; its meter knows the work from then on.
        store: results that were measured before.
        inputs: all that the costs depend on beside the model.

    Returns:
        The costs.

    Raises:
        CriterionError: the criterion gives something else.
    """
    key, kept = ("costs", criterion.name), is_built_in(criterion)
    known = store.get("costs", inputs) if kept else None
    if known is not None:
        costs, work = (
            recalled_costs(known, subject),
            Work(known["layer_forwards"], known["seconds"]),
        )
        subject.meter.recall(key, costs, work)
        return costs
    with subject.meter.account() as work:
        costs = subject.meter.shared(key, lambda: criterion.costs(subject))
    size = subject.num_layers + 1
    if not isinstance(costs, Costs) or costs.blocks.shape != (size, size):
        raise CriterionError(
            f"the criterion {criterion.name} gives no costs of {size - 1} layers: expected "
            f"costs() to give Costs of as many"
        )
    if kept:
        done = {"layer_forwards": work.layer_forwards, "seconds": work.seconds}
        store.put("costs", inputs, {**recorded_costs(costs), **done})
    return costs


def stored_choice(
    criterion: Criterion, subject: Subject, n: int, *, store: Store, inputs: Mapping[str, Any]
) -> tuple[Plan, Work]:
    """Let a criterion choose, or give what it chose before.

    Args:
        criterion: that chooses; of those of others than this package nothing is kept.
        subject: the model and its texts.
        n: layers that go.
        store: results that were found before.
        inputs: all that the choice depends on beside the model and ``n``.

    Returns:
        The layers to drop, and the work of finding them.

    Raises:
        CriterionError: the criterion gives something else.
    """
    inputs, kept = {"n": n, **inputs}, is_built_in(criterion)
    known = store.get("choice", inputs) if kept else None
    if known is not None:
        return Plan.from_json(known["plan"]), Work(known["layer_forwards"], known["seconds"])
    with subject.meter.account() as work:
        plans = criterion.plans(replace(subject, sizes=(n,)))
    plan = plans.get(n) if isinstance(plans, Mapping) else None
    if not isinstance(plan, Plan) or plan.num_layers != subject.num_layers:
        raise CriterionError(
            f"the criterion {criterion.name} gives no plan of {n} layers: expected plans() to "
            f"give a Plan of {subject.num_layers} layers for each of subject.sizes"
        )
    if len(plan.dropped) != n:
        raise CriterionError(
            f"the criterion {criterion.name} drops {len(plan.dropped)} layers: expected {n}"
        )
    if kept:
        done = {"plan": plan.to_json(), "layer_forwards": work.layer_forwards}
        store.put("choice", inputs, {**done, "seconds": work.seconds})
    return plan, work


def recorded_costs(costs: Costs) -> dict[str, Any]:
    """Give costs as plain JSON values.

    Args:
        costs: of any criterion, without samples.

    Returns:
        What :func:`recalled_costs` reads.
    """
    return {
        "metric": costs.metric,
        "strategy": costs.strategy,
        "of_single_layers": costs.of_single_layers,
        "blocks": _plain(costs.blocks),
        "stderr": None if costs.stderr is None else _plain(costs.stderr),
        "positions": None if costs.positions is None else asdict(costs.positions),
        "model": costs.model is not None,
        "texts": bool(costs.texts),
    }


def _plain(values: NDArray[np.float64]) -> list[list[float | None]]:
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def recalled_costs(known: Mapping[str, Any], subject: Subject) -> Costs:
    """Read costs that were recorded, of the same model and texts.

    Args:
        known: what :func:`recorded_costs` gave.
        subject: the model and its texts.

    Returns:
        The costs, bit for bit.
    """
    blocks = np.array(known["blocks"], np.float64)
    stderr = None if known["stderr"] is None else np.array(known["stderr"], np.float64)
    options: dict[str, Any] = {
        "metric": known["metric"], "strategy": known["strategy"],
        "model": subject.decoder.identity if known["model"] else None,
        "texts": subject.texts if known["texts"] else (),
        "positions": read(Positions | None, known["positions"]),
    }  # fmt: skip
    if not known["of_single_layers"]:
        return Costs.of_blocks(blocks, stderr=stderr, **options)
    errors = None if stderr is None else stderr.diagonal(1)
    return Costs.of_layers(blocks.diagonal(1), stderr=errors, **options)
