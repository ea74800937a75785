"""Tables of plans that were verified."""

from rich import box
from rich.table import Table
from rich.text import Text

from ..values.layers import ranges
from ..values.loss import with_error
from ..values.verification import Candidate, Verified

MOST_NAMES = 2
"""Names of those who proposed a plan, before they are counted."""


def candidates_table(verified: Verified) -> Table:
    """Tabulate the candidates of a race, in 80 columns.

    Args:
        verified: what came of it.

    Returns:
        A table with a row for every candidate, the winner first.
    """
    after = {"none": "as they are cut", "patch": "after a quick patch"}[verified.after]
    table = Table(
        title=f"{len(verified.candidates)} candidates of {verified.num_proposals} proposals, "
        f"{after}: {verified.unit}, {verified.num_items} items",
        box=box.SIMPLE,
    )
    table.add_column("drop [start, stop)")
    table.add_column("proposed by")
    table.add_column(f"{verified.judge} ± error", no_wrap=True)
    table.add_column("difference", no_wrap=True)
    table.add_column("")
    for candidate in verified.candidates:
        table.add_row(
            ranges(candidate.plan.dropped), Text(_names(candidate)),
            with_error(candidate.score, candidate.stderr, 3), str(candidate.difference),
            _said(candidate, verified),
        )  # fmt: skip
    return table


def failed_proposals(verified: Verified) -> list[str]:
    """Name the criteria that could not propose, and the proposals that could not be judged.

    Args:
        verified: what came of a race.

    Returns:
        A line for each.
    """
    return [f"{name}: {why}" for name, why in verified.failed.items()]


def _names(candidate: Candidate) -> str:
    names = candidate.proposed_by
    more = f", {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _said(candidate: Candidate, verified: Verified) -> str:
    if candidate is verified.candidates[0]:
        return "best"
    if candidate.lost_early:
        return f"lost on {candidate.difference.num_items}"
    return "a tie" if candidate.tied else ""
