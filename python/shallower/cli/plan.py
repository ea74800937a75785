"""``shallower plan``."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..artifacts import PLAN_FILE, SCAN_FILE, Plan
from ..errors import ScanError
from ..report import plan_table
from ..selection import deepest_block
from ..similarity import Scan
from ..storage import check_free
from .options import (
    DryRun,
    Json,
    Overwrite,
)
from .output import print_json, show


def plan_command(
    scans: Annotated[
        list[Path], typer.Argument(help="Scan files or their folders; several are merged.")
    ],
    n: Annotated[int, typer.Option("--n", help="Layers to drop.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write the plan to.")] = None,
    strategy: Annotated[
        Literal["similarity", "deepest"],
        typer.Option(help="The most similar block, or the deepest n layers but the last."),
    ] = "similarity",
    metric: Annotated[str | None, typer.Option(help="angular or cosine.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Choose the layers to drop from a scan."""
    scanned = _merged(scans)
    if strategy == "similarity":
        plan = scanned.plan(n, metric)
    else:
        block = deepest_block(scanned.num_layers, n)
        plan = Plan(scanned.num_layers, (block,), "deepest", model=scanned.model)
    written = []
    if out is not None:
        check_free(out / PLAN_FILE, overwrite)
        if not dry_run:
            plan.save(out / PLAN_FILE)
        written.append(f"{'would write' if dry_run else 'wrote'} {out / PLAN_FILE}")
    if as_json:
        print_json(plan.to_json())
    else:
        show(plan_table(plan), *written)


def _merged(scans: list[Path]) -> Scan:
    loaded = [Scan.load(path / SCAN_FILE if path.is_dir() else path) for path in scans]
    merged = Scan.merge(loaded)
    counted = Counter(texts for scanned in loaded for texts in scanned.texts)
    if counted and max(counted.values()) > 1:
        raise ScanError(
            "two of the scans are of the same texts, which would count twice: name each once"
        )
    return merged
