"""The choice of the layers to drop: by a scan and one of the strategies."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import LayersError, PlanError, ScanError
from ..experts.criteria import DEFAULT, ChosenExperts, chosen_experts
from ..values.costs import BootstrappedStart
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
        experts: the experts that go, by layer, if any do.
        unrouted: by layer that stays, the experts of which no token counts, if any go.
        left_out: experts' parts of texts that held NaN or infinity, if any go.
    """

    plan: Plan
    best: tuple[Block, ...] = ()
    start: BootstrappedStart | None = None
    num_resamples: int = 0
    seed: int = 0
    experts: tuple[ChosenExperts, ...] = ()
    unrouted: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    left_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """Give the choice as plain JSON values: those of the plan, ``top`` and ``bootstrap``.

        Of experts by layer ``scores``, ``unrouted``, those of which no token counts, and
        ``left_out``.
        """
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
        if self.experts:
            values["scores"] = {str(one.layer): one.to_json() for one in self.experts}
            values["unrouted"] = {str(layer): list(some) for layer, some in self.unrouted.items()}
            values["left_out"] = self.left_out
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
    n: int | None,
    *,
    strategy: str = "similarity",
    metric: str | None = None,
    max_blocks: int = 1,
    protect_first: int = 0,
    protect_last: int = 0,
    top: int = 0,
    bootstrap: int = 0,
    seed: int = 0,
    experts: int | None = None,
    criterion: str = DEFAULT,
) -> ScanChoice:
    """Choose the ``n`` layers of a scanned model to drop, all blocks together, or experts, or both.

    The strategy is ``similarity``, by :meth:`Scan.best_plan`, or ``deepest``: the deepest layers
    but the last, whatever the scan says. ``top`` is the number of best blocks to name beside the
    plan, ``bootstrap`` the number of resamples that show how sure its start is; 0 is none. So many
    ``experts`` go of every layer that stays, by a criterion.

    Raises:
        PlanError: an unknown strategy.
        LayersError: options that do not go together, or layers that cannot be dropped.
        MetricError: the scan does not hold the metric.
        ScanError: a bootstrap of a scan that keeps no samples, or experts of one without theirs.
        ExpertsError: experts that cannot be dropped, or by a criterion that the scan has not.
    """
    of_layers: dict[str, Any] = {
        "strategy": strategy,
        "metric": metric,
        "max_blocks": max_blocks,
        "protect_first": protect_first,
        "protect_last": protect_last,
        "top": top,
        "bootstrap": bootstrap,
    }
    if n is None and experts is None:
        raise LayersError("nothing is to go: name a number of layers (--n), or of experts")
    if n is None and [*of_layers.values()] != ["similarity", None, 1, 0, 0, 0, 0]:
        raise LayersError(
            "options for layers are given, and not how many go: name their number (n, --n), or "
            "leave out all options but experts, criterion and seed"
        )
    chosen = None if n is None else _choose_layers(scanned, n, seed=seed, **of_layers)
    if chosen is not None and experts is None:
        if criterion != DEFAULT:
            raise LayersError(
                f"a criterion of experts is given ({criterion}), and not how many go: name "
                f"their number (experts, --experts), or leave out the criterion"
            )
        return chosen
    assert experts is not None
    of_cut = None if chosen is None else chosen.plan
    plan = scanned.with_experts(of_cut, experts, criterion=criterion, seed=seed)
    chosen = chosen or ScanChoice(plan, seed=seed)
    assert plan.experts is not None
    found = scanned.experts
    rows = chosen_experts(found, plan.experts, seed)
    unrouted = {layer: some for layer, some in found.unrouted.items() if layer in plan.survivors}
    return replace(chosen, plan=plan, experts=rows, unrouted=unrouted, left_out=found.left_out)


def _choose_layers(
    scanned: Scan,
    n: int,
    *,
    strategy: str,
    metric: str | None,
    max_blocks: int,
    protect_first: int,
    protect_last: int,
    top: int,
    bootstrap: int,
    seed: int,
) -> ScanChoice:
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
