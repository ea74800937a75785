"""The choice of the layers to drop: by a scan and one of the strategies."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LayersError, PlanError, ScanError
from ..values.bootstrap import BootstrappedStart
from ..values.files import SCAN_FILE
from ..values.layers import Block, deepest_block
from ..values.plan import Plan
from .scan import Scan


@dataclass(frozen=True, slots=True)
class ScanChoice:
    """The layers to drop, and how they compare.

    Attributes:
        plan: the layers to drop.
        best: the best blocks of the plan's size, the best first.
        start: the resampled start of the block; None without a resampling.
        num_resamples: how often it was resampled.
        seed: of the resampling.
    """

    plan: Plan
    best: tuple[Block, ...] = ()
    start: BootstrappedStart | None = None
    num_resamples: int = 0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Give the choice as plain JSON values: those of the plan, ``top`` and ``bootstrap``."""
        values = self.plan.to_json()
        if self.best:
            values["top"] = [block.to_json() for block in self.best]
        if self.start is not None:
            values["bootstrap"] = {
                "num_resamples": self.num_resamples,
                "seed": self.seed,
                "share": self.start.probability,
                "probability": self.start.probability,
                "distribution": self.start.distribution.tolist(),
            }
        return values

    def sentence(self) -> str:
        """Say in how many resamples the block of the plan is the best, as a share."""
        if self.start is None:
            return ""
        return (
            f"{self.plan.blocks[0]} is the best block in a share of {self.start.probability:.3f} "
            f"of {self.num_resamples} resamples"
        )


def choose(
    scanned: Scan,
    n: int,
    *,
    strategy: str = "similarity",
    metric: str | None = None,
    max_blocks: int = 1,
    protect_first: int = 0,
    protect_last: int = 0,
    top: int = 0,
    bootstrap: int = 0,
    seed: int = 0,
) -> ScanChoice:
    """Choose the ``n`` layers of a scanned model to drop, all blocks together.

    The strategy is ``similarity``, by :meth:`Scan.best_plan`, or ``deepest``: the deepest layers
    but the last, whatever the scan says. ``top`` is the number of best blocks to name beside the
    plan, ``bootstrap`` the number of resamples that show how sure its start is; 0 is none.

    Raises:
        PlanError: an unknown strategy.
        LayersError: options that do not go together, or layers that cannot be dropped.
        MetricError: the scan does not hold the metric.
        ScanError: a bootstrap of a scan that keeps no samples.
    """
    one_block = (max_blocks, protect_first, protect_last) == (1, 0, 0)
    if strategy == "similarity":
        plan = scanned.best_plan(
            n,
            max_blocks=max_blocks,
            protect_first=protect_first,
            protect_last=protect_last,
            metric=metric,
        )
    elif strategy != "deepest":
        raise PlanError(f"unknown strategy {strategy!r}: expected similarity or deepest")
    elif not one_block or top or bootstrap:
        raise LayersError(
            "the strategy deepest names its block without looking at the scan: leave out "
            "max_blocks, protect_first, protect_last, top and bootstrap (--max-blocks, "
            "--protect-first, --protect-last, --top, --bootstrap)"
        )
    else:
        block = deepest_block(scanned.num_layers, n)
        plan = Plan(scanned.num_layers, (block,), "deepest", model=scanned.model)
    if bootstrap and not one_block:
        raise LayersError(
            "a bootstrap (--bootstrap) is of one block that may start anywhere: leave out "
            "max_blocks, protect_first and protect_last (leave out --max-blocks, "
            "--protect-first and --protect-last)"
        )
    best = scanned.best_blocks(n, top, metric) if top else []
    start = scanned.bootstrap(bootstrap, seed, metric=metric)[n] if bootstrap else None
    return ScanChoice(plan, tuple(best), start, bootstrap, seed)


def load_scans(paths: Sequence[str | Path]) -> Scan:
    """Load scans, from files or the folders that they are in, and merge them.

    A ScanError refuses a file that is not there or no scan, scans that cannot be merged, and two of
    the same texts, which would count twice.
    """
    places = [Path(path) for path in paths]
    loaded = [Scan.load(path / SCAN_FILE if path.is_dir() else path) for path in places]
    merged = Scan.merge(loaded)
    counted = Counter(texts for scanned in loaded for texts in scanned.texts)
    if counted and max(counted.values()) > 1:
        raise ScanError(
            "two of the scans are of the same texts, which would count twice: name each once"
        )
    return merged
