"""Tables of experts: those that go by a criterion, and those that nothing is known of."""

from ...experts.criteria import CRITERIA
from ...experts.statistics import ExpertStatistics
from ...scanning.choice import ScanChoice
from ...values.counts import counted
from ...values.layers import blocks_of, drop_option
from ..story import Number, Table

MOST_UNROUTED = 5
"""Layers whose experts without tokens are named; the others are only counted."""


def experts_table(chosen: ScanChoice) -> Table:
    """Tabulate the experts that go of each layer, with the scores between which the cut is."""
    dropped = chosen.plan.experts
    assert dropped is not None
    name = str(dropped.criterion)
    rows = tuple(
        (
            Number.count(one.layer),
            _named(one.experts),
            Number.estimate(one.last, 4),
            Number.estimate(one.next, 4),
        )
        for one in chosen.experts
    )
    return Table(
        f"experts: {dropped.count} of {dropped.num_experts} go of {counted(len(rows), 'layer')}, "
        f"by {name}: {CRITERIA[name].what}",
        ("layer", "drop", "the last to go", "the next"),
        rows,
    )


def unknown(chosen: ScanChoice) -> list[str]:
    """Name the experts that no token was sent to, and say what becomes of them.

    What was left out is counted, too; nothing is said where there is neither.
    """
    left_out = [_left_out(chosen.left_out)] if chosen.left_out else []
    if not chosen.unrouted:
        return left_out
    num = sum(map(len, chosen.unrouted.values()))
    gone = sum(
        len({*one.experts} & {*chosen.unrouted.get(one.layer, ())}) for one in chosen.experts
    )
    named = [
        f"{layer}: {_named(some)}" for layer, some in list(chosen.unrouted.items())[:MOST_UNROUTED]
    ]
    more = len(chosen.unrouted) - len(named)
    and_more = f"; and of {counted(more, 'more layer')}" if more > 0 else ""
    said = "received no token" if num == 1 else "received no tokens"
    return [
        f"{counted(num, 'expert')} {said} from these texts "
        f"(by layer {'; '.join(named)}{and_more}): {gone:,} of them "
        f"{'goes' if gone == 1 else 'go'}, {num - gone:,} {'stays' if num - gone == 1 else 'stay'}",
        *left_out,
    ]


def gathered(statistics: ExpertStatistics | None) -> list[str]:
    """Say of what experts a scan has statistics, in a sentence, if of any."""
    if statistics is None:
        return []
    num = sum(map(len, statistics.unrouted.values()))
    layers, experts = counted(len(statistics.layers), "layer"), statistics.routing.num_experts
    left_out = f"; {_left_out(statistics.left_out)}" if statistics.left_out else ""
    return [
        f"experts: {experts} in each of {layers}, {num} of which received no token{left_out}; "
        f"choose by plan --experts K"
    ]


def _left_out(parts: int) -> str:
    return f"{counted(parts, 'part')} of texts left out, which held NaN or infinity"


def _named(experts: tuple[int, ...]) -> str:
    """Experts as ``--drop-experts`` names those of a layer."""
    return drop_option(blocks_of(experts))
