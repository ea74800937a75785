"""Proposals: cuts of one size that several criteria and searches would make."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import CacheError, CostsError, OutputError
from ..values.costs import Costs
from ..values.layers import blocks_of
from .contest import one_sentence
from .criteria.angular import Angular
from .criteria.block_influence import BlockInfluence
from .criteria.cka import LinearCka
from .criteria.magnitude import Magnitude
from .criteria.relative_l2 import RelativeL2
from .criteria.xmerge import XMerge
from .criterion import Criterion
from .held_out_cuts import Store
from .stored_costs import recalled_costs, recorded_costs
from .subject import Subject
from .token_states import evenly
from .work import Work

Cut = frozenset[int]

PROPOSERS: tuple[Criterion, ...] = (
    Angular(), RelativeL2(), LinearCka(), BlockInfluence(), Magnitude(), XMerge(),
)  # fmt: skip
"""Criteria that propose: by two passes over some texts, without a head."""

PROPOSING_TEXTS = 8
"""Texts that the criteria look at, evenly over those that fit."""


@dataclass
class Proposals:
    """Cuts of one size by those that named them.

    Attributes:
        names: of every cut, without repetition, in the order in which it was named.
        failed: the criteria that could not propose, and the cuts that could not be judged, with
            the reason.
        max_blocks: blocks of a cut at most; None for no limit.
    """

    names: dict[Cut, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    max_blocks: int | None = None

    def allows(self, cut: Collection[int]) -> bool:
        """Tell whether a cut has no more blocks than are allowed."""
        return self.max_blocks is None or len(blocks_of(sorted(cut))) <= self.max_blocks

    def add(self, cut: Iterable[int], name: str) -> None:
        """Take a cut in.

        Args:
            cut: the layers that go; one that is not allowed is left out.
            name: of whoever proposes it.
        """
        cut = frozenset(cut)
        if self.allows(cut) and name not in (names := self.names.setdefault(cut, [])):
            names.append(name)


def all_costs(subject: Subject, store: Store, *, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the costs by every criterion that proposes, once for all sizes.

    Args:
        subject: the model and its texts; its meter is charged.
        store: results that were measured before.
        inputs: all that the costs depend on beside the model.

    Returns:
        By name the costs; or a sentence that says why there are none.
    """
    batches = evenly(subject.batches, PROPOSING_TEXTS)
    some = replace(subject, batches=batches, progress=False)
    names = [criterion.name for criterion in PROPOSERS]
    inputs = {"criteria": names, "num_texts": PROPOSING_TEXTS, **inputs}
    known = store.get("proposing", inputs)
    if known is not None:
        found = {
            name: one if isinstance(one, str) else recalled_costs(one, some)
            for name, one in known["costs"].items()
        }
        work = Work(known["layer_forwards"], known["seconds"])
        subject.meter.recall("proposing", found, work)
    else:
        with subject.meter.account() as work:
            found = subject.meter.shared("proposing", lambda: dict(_measured(some)))
        kept = {k: one if isinstance(one, str) else recorded_costs(one) for k, one in found.items()}
        done = {"layer_forwards": work.layer_forwards, "seconds": work.seconds}
        store.put("proposing", inputs, {"costs": kept, **done})
    return subject.meter.shared("proposing", lambda: found)


def _measured(subject: Subject) -> Iterator[tuple[str, Costs | str]]:
    """The costs by each criterion; one that fails says why, and the others go on."""
    for criterion in PROPOSERS:
        try:
            yield criterion.name, criterion.costs(subject)
        except (CacheError, OutputError):
            raise
        except Exception as error:
            yield criterion.name, one_sentence(error)


def propose(
    proposals: Proposals, costs: Mapping[str, Costs | str], n: int, *, base: Cut, top: int
) -> None:
    """Let every criterion propose.

    Args:
        proposals: that are added to.
        costs: by name, of :func:`all_costs`.
        n: layers that go, with those of ``base``.
        base: layers that are gone already.
        top: the best so many blocks of each criterion.
    """
    for name, one in costs.items():
        if isinstance(one, str):
            proposals.failed[name] = one
            continue
        found = _cheapest_windows(one, n, base=base, top=top)
        found += _cheapest_sets(one, n, base=base, max_blocks=proposals.max_blocks)
        for cut in found:
            if len(cut) == n:
                proposals.add(cut, name)


def windows(num_layers: int, n: int, *, base: Cut = frozenset()) -> list[Cut]:
    """List the cuts whose layers, beside those of the base, are neighbours once it is gone.

    Args:
        num_layers: L.
        n: layers that go, with those of ``base``.
        base: layers that are gone already.

    Returns:
        The cuts, by their first layer.
    """
    left = [layer for layer in range(num_layers) if layer not in base]
    more = n - len(base)
    return [base.union(left[i : i + more]) for i in range(len(left) - more + 1)]


def _cheapest_windows(costs: Costs, n: int, *, base: Cut, top: int) -> list[Cut]:
    """The cheapest of :func:`windows`; a cut costs what its blocks do together."""
    ranked = []
    for number, cut in enumerate(windows(costs.num_layers, n, base=base)):
        cost = sum(float(costs.blocks[b.start, b.stop]) for b in blocks_of(sorted(cut)))
        if np.isfinite(cost):
            ranked.append((cost, number, cut))
    return [cut for _, _, cut in sorted(ranked, key=lambda one: one[:2])[:top]]


def _cheapest_sets(costs: Costs, n: int, *, base: Cut, max_blocks: int | None) -> Iterator[Cut]:
    """The cheapest cut of at most two blocks, and that of as many as there may be."""
    if base:
        if costs.of_single_layers:
            values = costs.blocks.diagonal(1)
            order = [int(layer) for layer in np.argsort(values, kind="stable")]
            left = [layer for layer in order if layer not in base and np.isfinite(values[layer])]
            yield base.union(left[: n - len(base)])
        return
    most = n if max_blocks is None else min(n, max_blocks)
    for blocks in sorted({min(2, most), most}):
        try:
            yield frozenset(costs.best_plan(n, blocks).dropped)
        except CostsError:
            return  # too few blocks were measured
