"""Tables for the terminal: scans, plans, losses, healings, patches."""

from collections.abc import Sequence

from rich.table import Table

from ..scanning.scan import Scan
from ..values.bootstrap import BootstrappedStart
from ..values.healing import Healing
from ..values.layers import Block, ranges
from ..values.loss import with_error
from ..values.patch import Patch
from ..values.plan import Plan


def scan_table(scan: Scan) -> Table:
    """Tabulate the best block of every size, and its distance.

    Args:
        scan: of any metrics; decided by the angle if that is among them.

    Returns:
        A table with a row for every n.
    """
    metric = "angular" if "angular" in scan.metrics else f"1 - {scan.metrics[0]}"
    samples = f"{scan.num_samples} samples"
    if scan.num_sequences < scan.num_samples:
        samples = f"{scan.num_samples} tokens of {scan.num_sequences} sequences"
    table = Table(
        title=f"{scan.num_layers} layers, {samples}"
        + (f", {scan.num_rejected} rejected" if scan.num_rejected else "")
        + (f"; positions {scan.positions}" if scan.positions else "")
    )
    table.add_column("n", justify="right")
    table.add_column("drop [start, stop)")
    table.add_column(f"{metric} ± error")
    for n in range(1, scan.num_layers):
        block = scan.best_block(n)
        table.add_row(str(n), str(block), with_error(block.score, block.stderr))
    return table


def rejected(scan: Scan) -> list[str]:
    """Name the rejected samples of a scan, a line each.

    Args:
        scan: a scan; it names the first of its rejections.

    Returns:
        One sentence for every sample that is named.
    """
    return [f"rejected {rejection}" for rejection in scan.rejections]


def plan_table(plan: Plan) -> Table:
    """Tabulate what a plan drops and keeps.

    Args:
        plan: any plan; a block without a score has none in the table.

    Returns:
        A table with a row for every block, and one for the layers that stay.
    """
    table = Table(title=f"plan: {len(plan.dropped)} of {plan.num_layers} layers", show_header=False)
    for block in plan.blocks:
        table.add_row("drop", str(block), _score(block, plan.metric))
    table.add_row("keep", ranges(plan.survivors), f"{len(plan.survivors)} layers")
    return table


def starts_table(
    blocks: Sequence[Block], metric: str | None, sure: BootstrappedStart | None = None
) -> Table:
    """Tabulate the best blocks of one size, and how often resampling finds each the best.

    Args:
        blocks: of one size, the best first.
        metric: the metric behind their scores.
        sure: a bootstrap of the scan; its shares of resamples are a column.

    Returns:
        A table with a row for every block.
    """
    table = Table(title=f"the best blocks of {len(blocks[0])}")
    table.add_column("rank", justify="right")
    table.add_column("drop [start, stop)")
    table.add_column(f"{'1 - cosine' if metric == 'cosine' else metric} ± error")
    if sure is not None:
        table.add_column("share", justify="right")
    for rank, block in enumerate(blocks, 1):
        cells = [str(rank), str(block), with_error(block.score, block.stderr)]
        if sure is not None:
            cells.append(f"{sure.distribution[block.start]:.3f}")
        table.add_row(*cells)
    return table


def _score(block: Block, metric: str | None) -> str:
    if block.score is None:
        return ""
    return f"{metric or 'distance'} {with_error(block.score, block.stderr)}"


def healing_table(healing: Healing) -> Table:
    """Tabulate the held-out loss over the steps of a healing.

    Args:
        healing: the record of a healing, merged or not.

    Returns:
        A table with a row for every measured step; the title tells the share of the lost nats
        that was recovered.
    """
    title = f"healing: {len(healing.steps)} steps, step {healing.best_step} kept"
    if healing.recovered is not None:
        title += f", {100 * healing.recovered:.0f} % of the lost nats recovered"
    table = Table(title=title)
    table.add_column("step", justify="right")
    table.add_column("held-out loss ± error", no_wrap=True)
    table.add_column("training loss", no_wrap=True)
    training = {step.step: f"{step.loss:.3f}" for step in healing.steps}
    rows = {measured.step: str(measured.loss) for measured in healing.held_out}
    rows = rows or {healing.best_step: ""}
    if healing.cut:
        table.add_row("unpatched", str(healing.cut), "")
    for step, loss in rows.items():
        table.add_row(str(step), loss, training.get(step, ""))
    if healing.original:
        table.add_row("uncut", str(healing.original), "")
    return table


def patch_table(patch: Patch) -> Table:
    """Tabulate the layers that a patch solved anew, and the loss behind each.

    Args:
        patch: of :func:`shallower.patch`.

    Returns:
        A table with a row for the whole model, the cut, and every layer that was solved.
    """
    title = f"patch by {patch.method}: {100 * patch.recovered:.0f} % of the lost nats recovered"
    table = Table(title=title, caption=f"held-out loss on {patch.num_held_out:,} tokens")
    table.add_column("after solving")
    table.add_column("for")
    table.add_column("R²", justify="right")
    table.add_column("nats a token", justify="right")
    table.add_row("all layers", "", "", f"{patch.original:.4f}")
    table.add_row(f"cut, without {ranges(patch.plan.dropped)}", "", "", f"{patch.cut:.4f}")
    for fit in patch.fits:
        cells = (f"x^({fit.target})", f"{fit.explained:.3f}", f"{fit.nats:.4f}")
        table.add_row(", ".join(fit.matrices), *cells)
    for nats in patch.descent:
        table.add_row("all matrices from there on, by steps", "", "", f"{nats:.4f}")
    return table


def cache_table(rows: Sequence[tuple[str, int, str, str, str]]) -> Table:
    """Tabulate the entries of the cache by kind.

    Args:
        rows: kind, number, size, and the dates of the oldest and the newest.

    Returns:
        A table with a row for every kind.
    """
    table = Table(title="measured before")
    for name in ("kind", "entries", "size", "oldest", "newest"):
        table.add_column(name, justify="right" if name in ("entries", "size") else "left")
    for row in rows:
        table.add_row(*map(str, row))
    return table
