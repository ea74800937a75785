"""The table of what other sizes would cost, and models that speak, as a run shows them."""

import math
from collections.abc import Sequence

from rich.table import Table

from ..values.layers import ranges
from ..values.recommendation import Recommended, SizeRow


def sizes_table(recommended: Recommended, rows: Sequence[SizeRow]) -> Table:
    """Tabulate what the verified cut of every size costs, and the deepest one beside it.

    Args:
        recommended: the cut that a run ends in; its row is marked.
        rows: of every size.

    Returns:
        A table with a row for every size, and one for the model that is recommended.
    """
    whole = recommended.whole
    table = Table(
        title=f"held-out loss, nats a token; with all layers {whole}\n"
        f"{whole.num_tokens} tokens of {whole.num_texts} texts that nothing was chosen by",
        caption="patched: quickly, one matrix a block. deepest: without the deepest n layers but "
        f"the last, cut / patched.{estimated(rows, whole.num_texts)}",
    )
    for name in ("n", "drop", "weights", "cut", "patched", "more ± error", "deepest"):
        is_number = name not in ("drop", "more ± error")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name != "drop")
    for row in rows:
        is_chosen = row.dropped == recommended.plan.dropped
        table.add_row(
            f"→ {row.n}" if is_chosen else str(row.n), ranges(row.dropped),
            f"-{100 * row.parameters_share:.0f} %", f"{row.cut:.3f}", _nats(row.patched),
            _more(row.patched_lost, row.patched_lost_stderr),
            f"{row.deepest:.2f} / {_nats(row.deepest_patched, 2)}",
        )  # fmt: skip
    return table


def estimated(rows: Sequence[SizeRow], num_texts: int) -> str:
    """Say which losses of a table are estimated.

    Args:
        rows: of every size.
        num_texts: that report.

    Returns:
        A sentence with a space before it, as `` Of n = 4, 12: estimated by 64 of the 165 texts.``;
        nothing where all texts were looked at.
    """
    few = [row for row in rows if row.num_texts < num_texts]
    if not few:
        return ""
    sizes = ", ".join(str(row.n) for row in few)
    return f" Of n = {sizes}: estimated by {few[0].num_texts} of the {num_texts} texts."


def _nats(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _more(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    error = "" if stderr is None or math.isnan(stderr) else f" ± {stderr:.3f}"
    return f"{value:+.3f}{error}"


def losses_line(recommended: Recommended) -> str:
    """Write the losses on the way to the model that is recommended.

    Args:
        recommended: the cut that a run ends in.

    Returns:
        As ``whole 3.592 → cut 4.629 → patched 4.019 (58 % of the lost nats recovered)``.
    """
    steps = ["whole", "cut", "patched", "healed"]
    losses = [(name, getattr(recommended, name)) for name in steps]
    line = " → ".join(f"{name} {loss.nats:.3f}" for name, loss in losses if loss)
    lost = recommended.cut.nats - recommended.whole.nats
    if recommended.state == "cut" or not lost > 0:
        return line
    back = (recommended.cut.nats - recommended.loss.nats) / lost
    return f"{line} ({100 * back:.0f} % of the lost nats recovered)"
