"""Tables of plans that were verified."""

from io import StringIO

from rich.console import Console

from shallower.reporting.verification import candidates_table, failed_proposals
from tests.values.test_verification import GIVEN_UP, LOSER, TIE, WINNER, verified


def test_a_row_for_every_candidate_in_80_columns():
    found = verified(WINNER, TIE, LOSER, GIVEN_UP)
    console = Console(width=80, record=True, file=StringIO())
    console.print(candidates_table(found))
    lines = console.export_text().splitlines()
    assert all(len(line) <= 80 for line in lines)
    shown = " ".join(" ".join(lines).split())
    assert "4 candidates of 9 proposals, after a quick patch" in shown
    for part in ("[12, 20)", "4.052 ± 0.060", "best", "a tie", "lost on 8", "+0.148 ± 0.020"):
        assert part in shown
    assert failed_proposals(found) == ["cka: too few texts"]
