"""``shallower plan``."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import LayersError, ScanError
from ..reporting.tables import plan_table, starts_table
from ..scanning.scan import BootstrappedStart, Scan
from ..storage import check_free
from ..values.files import PLAN_FILE, SCAN_FILE
from ..values.layers import deepest_block
from ..values.plan import Plan
from .options import DryRun, Json, Overwrite
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
    metric: Annotated[str | None, typer.Option(help="angular, cosine or relative_l2.")] = None,
    max_blocks: Annotated[
        int, typer.Option(help="Blocks at most, with a layer that stays between them.", min=1)
    ] = 1,
    protect_first: Annotated[int, typer.Option(help="Layers at the start that stay.", min=0)] = 0,
    protect_last: Annotated[int, typer.Option(help="Layers at the end that stay.", min=0)] = 0,
    top: Annotated[int, typer.Option(help="List so many of the best blocks of N.", min=0)] = 0,
    bootstrap: Annotated[
        int,
        typer.Option(
            help="Resample so many times how sure the start of one block is; the scans must have "
            "been made with --keep-samples.",
            min=0,
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of --bootstrap.", min=0)] = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Choose the layers to drop from a scan."""
    scanned = _merged(scans)
    one_block = (max_blocks, protect_first, protect_last) == (1, 0, 0)
    if strategy == "similarity":
        plan = scanned.best_plan(n, max_blocks, protect_first, protect_last, metric)
    elif not one_block or top or bootstrap:
        raise LayersError(
            "--strategy deepest names its block without looking at the scan: leave out "
            "--max-blocks, --protect-first, --protect-last, --top and --bootstrap"
        )
    else:
        block = deepest_block(scanned.num_layers, n)
        plan = Plan(scanned.num_layers, (block,), "deepest", model=scanned.model)
    if bootstrap and not one_block:
        raise LayersError(
            "--bootstrap is for one block that may start anywhere: leave out --max-blocks, "
            "--protect-first and --protect-last"
        )
    best = scanned.best_blocks(n, top, metric) if top else []
    sure = scanned.bootstrap(bootstrap, seed, metric)[n] if bootstrap else None
    written = []
    if out is not None:
        check_free(out / PLAN_FILE, overwrite)
        if not dry_run:
            plan.save(out / PLAN_FILE)
        written.append(f"{'would write' if dry_run else 'wrote'} {out / PLAN_FILE}")
    if as_json:
        described = plan.to_json()
        if best:
            described["top"] = [block.to_json() for block in best]
        if sure:
            described["bootstrap"] = _described(sure, bootstrap, seed)
        print_json(described)
        return
    tables = [starts_table(best, plan.metric, sure)] if best else []
    said = [_said(plan, sure, bootstrap)] if sure else []
    show(plan_table(plan), *tables, *said, *written)


def _described(sure: BootstrappedStart, num_resamples: int, seed: int) -> dict[str, Any]:
    return {
        "num_resamples": num_resamples,
        "seed": seed,
        "probability": sure.probability,
        "distribution": sure.distribution.tolist(),
    }


def _said(plan: Plan, sure: BootstrappedStart, num_resamples: int) -> str:
    return (
        f"{plan.blocks[0]} is the best block with probability {sure.probability:.3f} "
        f"({num_resamples} resamples)"
    )


def _merged(scans: list[Path]) -> Scan:
    loaded = [Scan.load(path / SCAN_FILE if path.is_dir() else path) for path in scans]
    merged = Scan.merge(loaded)
    counted = Counter(texts for scanned in loaded for texts in scanned.texts)
    if counted and max(counted.values()) > 1:
        raise ScanError(
            "two of the scans are of the same texts, which would count twice: name each once"
        )
    return merged
