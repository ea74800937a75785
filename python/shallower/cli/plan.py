"""``shallower plan``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..settings import options as option
from ..settings.options import Option
from ..values.files import PLAN_FILE, SCAN_FILE
from .options import DryRun, Json, Overwrite
from .output import print_json, show

if TYPE_CHECKING:
    from ..scanning.choice import ScanChoice


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What goes, and by what it is chosen."""

    experts: int | None = option.basic(
        None,
        "Number of experts to drop of every layer that stays; for scans made with --experts.",
        "K",
    )
    criterion: str = option.target(
        "reap",
        "Criterion that lets experts go: frequency, soft-frequency, ean, man, msan, reap, easy-ep, "
        "reconstruction, aimer or random.",
        "NAME",
    )
    strategy: Literal["similarity", "deepest"] = option.target(
        "similarity", "The most similar layers, or the deepest but the last."
    )
    metric: str | None = option.target(
        None,
        "Metric that decides: angular, cosine or relative_l2; angular by default where the scan "
        "holds it.",
        "NAME",
    )
    max_blocks: int = option.target(
        1, "Blocks at most; a layer stays between two blocks.", "N", least=1
    )
    protect_first: int = option.target(0, "Number of layers at the start that stay.", "N", least=0)
    protect_last: int = option.target(0, "Number of layers at the end that stay.", "N", least=0)
    top: int = option.output(0, "Also list the K best blocks of --n layers.", "K", least=0)
    bootstrap: int = option.measures(
        0,
        "Resample the texts B times, and say in which share of them the block is the best; for "
        "scans made with --keep-samples.",
        "B",
        least=0,
    )
    seed: int = option.measures(0, "Seed of --bootstrap, and of --criterion random.", "N", least=0)


def plan_command(
    *,
    scans: Annotated[
        list[Path],
        typer.Argument(metavar="SCAN", help="Scan files or their folders; several are merged."),
    ],
    n: Annotated[int | None, Option("Number of layers to drop.", "N")] = None,
    out: Annotated[Path | None, Option("Folder to write the plan to.", "FOLDER")] = None,
    choice: PlanOptions,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Choose the layers or experts to drop from a scan.

    Writes shallower_plan.json for prune, eval and patch; without --out the plan is shown only.
    """
    from ..scanning.choice import choose, load_scans
    from ..storage import check_apart, check_free, holds

    if out is not None:
        read = (one / SCAN_FILE if one.is_dir() else one for one in scans)
        check_apart(out / PLAN_FILE, read)
    chosen = choose(load_scans(scans), n, **vars(choice))
    said = "would write {}" if dry_run else "wrote {}"
    if out is not None and holds(out / PLAN_FILE, chosen.plan.to_bytes()):
        said = "{} is already there, made from the same inputs"
    elif out is not None:
        check_free(out / PLAN_FILE, overwrite)
        if not dry_run:
            chosen.plan.save(out / PLAN_FILE)
    if as_json:
        print_json(chosen.to_json())
        return
    parts = _choice(chosen)
    if out is not None:
        parts.append(said.format(out / PLAN_FILE))
    show(*parts)


def _choice(chosen: "ScanChoice") -> list[Any]:
    from ..reporting.stories.stages import experts_table, plan_table, starts_table, unknown

    parts: list[Any] = [plan_table(chosen.plan)]
    if chosen.experts:
        parts += [experts_table(chosen), *unknown(chosen)]
    if chosen.best:
        parts.append(starts_table(chosen.best, chosen.plan.metric, chosen.start))
    if chosen.start:
        parts.append(chosen.sentence())
    return parts
