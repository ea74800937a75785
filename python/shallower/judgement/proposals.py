"""Proposals: cuts of one size that several criteria and a search of neighbours would make."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import CacheError, CostsError, OutputError, one_sentence
from ..values.costs import Costs
from ..values.entries import ResultStore
from ..values.layers import blocks_of
from .criteria.layer_change import BlockInfluence, Magnitude, XMerge
from .criteria.similarity import Angular, LinearCka, RelativeL2
from .criterion import Criterion
from .stored_costs import recalled_costs, recorded_costs
from .subject import Subject, evenly

Cut = frozenset[int]

PROPOSERS: tuple[Criterion, ...] = (
    Angular(),
    RelativeL2(),
    LinearCka(),
    BlockInfluence(),
    Magnitude(),
    XMerge(),
)
"""Criteria that propose: by two passes over some texts, without a head."""

PROPOSING_TEXTS = 8
"""Texts that the criteria look at, evenly over the calibration texts."""

PROBED = 2
"""Forwards of one text by which a model is checked before it is run layer by layer."""

TRIED = 8
"""Exchanges of a step that are judged: those that are guessed to be the best."""


@dataclass
class Proposals:
    """Cuts of one size by those that named them."""

    # By cut, in the order in which it was named.
    names: dict[Cut, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # criteria and cuts, with the reason
    max_blocks: int | None = None  # of a cut; None for no limit

    def allows(self, cut: Collection[int]) -> bool:
        """Whether a cut has no more blocks than are allowed."""
        return self.max_blocks is None or len(blocks_of(sorted(cut))) <= self.max_blocks

    def add(self, cut: Iterable[int], name: str) -> None:
        """Add a cut that a criterion or a search of that name proposes, if it is allowed."""
        cut = frozenset(cut)
        if self.allows(cut):
            self.take(cut, name)

    def take(self, cut: Cut, name: str) -> None:
        """Add a cut whatever its blocks."""
        if name not in (names := self.names.setdefault(cut, [])):
            names.append(name)


def block_layers(num_layers: int, n: int) -> int:
    """Count the layers that are left by all contiguous blocks of ``n``, together."""
    left = num_layers - n
    return (left + 1) * left


def proposing_texts(subject: Subject) -> Subject:
    """The subject on the texts that criteria look at to propose."""
    batches = evenly(subject.batches, PROPOSING_TEXTS)
    return replace(subject, batches=batches, store=None, made={})


def proposing_layers(subject: Subject) -> int:
    """Count the layers that all of ``PROPOSERS`` run, times texts: two passes, and a check."""
    return subject.num_layers * (2 * proposing_texts(subject).num_texts + PROBED)


def all_costs(
    subject: Subject, store: ResultStore, *, inputs: Mapping[str, Any]
) -> dict[str, Costs | str]:
    """Measure costs by every criterion that proposes, for all sizes; or say why there are none.

    ``inputs`` are all that the costs depend on beside the model.
    """
    some, names = proposing_texts(subject), [criterion.name for criterion in PROPOSERS]
    named = {"criteria": names, "num_texts": PROPOSING_TEXTS, **inputs}

    def recorded() -> dict[str, Costs | str]:
        known = store.get("costs", named)
        if known is not None:
            return {
                name: one if isinstance(one, str) else recalled_costs(one, some)
                for name, one in known["costs"].items()
            }
        found = dict(_measured(some))
        kept = {k: one if isinstance(one, str) else recorded_costs(one) for k, one in found.items()}
        store.put("costs", named, {"costs": kept})
        return found

    return subject.shared("proposing", recorded)


def _measured(subject: Subject) -> Iterator[tuple[str, Costs | str]]:
    """The costs by each criterion; one that fails gives the reason, and the others continue."""
    for criterion in PROPOSERS:
        try:
            yield criterion.name, criterion.costs(subject)
        except (CacheError, OutputError):
            raise
        except Exception as error:
            yield criterion.name, one_sentence(error)


def propose(proposals: Proposals, costs: Mapping[str, Costs | str], n: int, *, top: int) -> None:
    """Add what every criterion proposes of ``n`` layers: its ``top`` best blocks and best sets."""
    for name, one in costs.items():
        if isinstance(one, str):
            proposals.failed[name] = one
            continue
        found = _cheapest_blocks(one, n, top=top)
        found += _cheapest_sets(one, n, max_blocks=proposals.max_blocks)
        for cut in found:
            proposals.add(cut, name)


def contiguous(num_layers: int, n: int) -> list[Cut]:
    """List the cuts of one block, by their first layer."""
    return [frozenset(range(start, start + n)) for start in range(num_layers - n + 1)]


def _cheapest_blocks(costs: Costs, n: int, *, top: int) -> list[Cut]:
    ranked = []
    for start, cut in enumerate(contiguous(costs.num_layers, n)):
        cost = float(costs.blocks[start, start + n])
        if np.isfinite(cost):
            ranked.append((cost, start, cut))
    return [cut for _, _, cut in sorted(ranked, key=lambda one: one[:2])[:top]]


def _cheapest_sets(costs: Costs, n: int, *, max_blocks: int | None) -> Iterator[Cut]:
    """The cheapest cut of at most two blocks, and that of as many as there may be."""
    most = n if max_blocks is None else min(n, max_blocks)
    for blocks in sorted({min(2, most), most}):
        try:
            yield frozenset(costs.best_plan(n, blocks).dropped)
        except CostsError:
            return  # too few blocks were measured


def exchanges(
    score: Callable[[Sequence[Cut]], list[float]],
    guess: Callable[[Sequence[Cut]], list[float]],
    start: Cut,
    *,
    num_layers: int,
    allows: Callable[[Cut], bool],
    goes_on: Callable[[], bool],
) -> Iterator[Cut]:
    """Search for a better cut of as many layers by exchanging one dropped for one kept layer.

    The n (L - n) exchanges are ranked by the sum of their halves, L trials in all; the most
    promising are judged, as long as that gains. Yields every judged cut. ``score`` takes several
    cuts (infinity: not judgeable), ``guess`` uses fewer items, ``goes_on`` decides before each
    step.
    """
    best, tried = start, {start}
    while len(best) + 1 < num_layers and goes_on():
        (here,) = score([best])
        back = sorted(best)
        out = [layer for layer in reversed(range(num_layers)) if layer not in best]
        tries = [best - {layer} for layer in back] + [best | {layer} for layer in out]
        halves = dict(zip((*back, *out), guess(tries), strict=True))
        guesses = sorted((halves[i] + halves[j], i, j) for i in back for j in out)
        cuts = [best - {i} | {j} for _, i, j in guesses]
        cuts = [cut for cut in cuts if cut not in tried and allows(cut)][:TRIED]
        tried.update(cuts)
        scores = dict(zip(cuts, score(cuts), strict=True))
        yield from cuts
        better = [cut for cut in cuts if scores[cut] < here]
        if not better:
            return
        best = min(better, key=scores.__getitem__)
