"""Figures of a sweep: what each model bears, heat maps, l* over depth, and criteria's regret."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ...errors import ShallowerError
from ...scanning.scan import Scan
from ...values.comparison import CriteriaComparison
from ...values.costs import NUM_RESAMPLES
from ...values.curve import Curve
from ...values.layers import ranges
from ...values.scores import Estimate
from ...values.settings import State
from ...values.sweep import BestCut, Borne, Sweep, borne
from ..results import read_job
from .comparison import Group, groups_of
from .curve import STATE_STYLES
from .drawing import Drawing
from .heat_map import heat_maps
from .plots import Axis, Line, Point, dot_chart, line_chart, series_colour


@dataclass(frozen=True, slots=True)
class Start:
    """The best start of a block of one size, and how it moves when texts are drawn again.

    Attributes:
        n: layers of the block.
        start: l*(n).
        probability: the share of resamples in which it is the same; None without samples.
        spread: the standard deviation of the start over resamples, in layers; None likewise.
    """

    n: int
    start: int
    probability: float | None
    spread: float | None


@dataclass(frozen=True)
class Found:
    """What the jobs on one model and one text have found.

    Attributes:
        title: of the model, with the texts that chose where there are several.
        comparison: of criteria; None where that job is not done.
        scan: of the model; None likewise.
        curves: of healed cuts.
    """

    title: str
    comparison: CriteriaComparison | None
    scan: Scan | None
    curves: tuple[Curve, ...]

    @property
    def group(self) -> Group | None:
        """The rows of the comparison."""
        groups = [] if self.comparison is None else groups_of(self.comparison)
        return replace(groups[0], title=self.title) if groups else None

    def cuts(self, state: State) -> list[BestCut]:
        """The best cut of every size in a state, of those that were measured."""
        found: dict[float, BestCut] = {}
        for cut in self._healed() if state == "healed" else self._compared(state):
            if cut.share not in found or cut.lost.mean < found[cut.share].lost.mean:
                found[cut.share] = cut
        return [found[share] for share in sorted(found)]

    def _compared(self, state: State) -> list[BestCut]:
        group, by_patch = self.group, state == "patched"
        if group is None:
            return []
        return [
            BestCut(
                self.title, state, row.layers_share, one.difference, row.dropped, row.criterion,
            )
            for n in sorted({row.n for row in group.rows})
            for row, one in group.ranked(n, by_patch=by_patch)
        ]  # fmt: skip

    def _healed(self) -> list[BestCut]:
        return [
            BestCut(
                self.title, "healed", point.layers_share, Estimate.of(lost), point.dropped,
                point.strategy,
            )
            for curve in self.curves
            for point in curve.points
            if point.state == "healed" and (lost := curve.lost(point)) is not None
        ]  # fmt: skip

    @cached_property
    def starts(self) -> tuple[Start, ...]:
        """The best start of every size; none without a scan by the angle."""
        scan = self.scan
        if scan is None or "angular" not in scan.metrics or scan.num_layers < 2:
            return ()
        try:
            resampled = scan.bootstrap(NUM_RESAMPLES, metric="angular")
        except ShallowerError:  # it has too few samples
            resampled = {}
        found = []
        for n in range(1, scan.num_layers):
            start, one = scan.best_block(n, "angular").start, resampled.get(n)
            probability = spread = None
            if one is not None:
                probability = one.probability
                places = np.arange(len(one.distribution))
                mean = float(one.distribution @ places)
                spread = math.sqrt(float(one.distribution @ (places - mean) ** 2))
            found.append(Start(n, start, probability, spread))
        return tuple(found)


def read_found(out: Path, sweep: Sweep) -> list[Found]:
    """Read the results of all jobs of a sweep that are done, by model and texts."""
    several = len({job.texts for job in sweep.jobs}) > 1
    found = []
    for model, texts in dict.fromkeys((job.model, job.texts) for job in sweep.jobs):
        jobs = [
            job for job in sweep.jobs if (job.model, job.texts, job.state) == (model, texts, "done")
        ]
        results = [read_job(out, job) for job in jobs]
        compared = [one for one in results if isinstance(one, CriteriaComparison)]
        scans = [one for one in results if isinstance(one, Scan)]
        found.append(
            Found(
                f"{model} on {texts}" if several else model,
                next(iter(compared), None),
                next(iter(scans), None),
                tuple(one for one in results if isinstance(one, Curve)),
            )
        )
    return found


def all_cuts(found: Sequence[Found], sweep: Sweep) -> list[list[BestCut]]:
    """The best cuts of every model and state that has some."""
    of = [one.cuts(state) for one in found for state in sweep.states]
    return [cuts for cuts in of if cuts]


def loss_charts(found: Sequence[Found], sweep: Sweep) -> list[Drawing]:
    """Draw the loss of the best cuts over the share of layers, and the share borne at a loss."""
    cuts = all_cuts(found, sweep)
    if not cuts:
        return []
    titles = [one.title for one in found]
    most = 2 * max(sweep.losses)
    lines = [
        Line(
            _named(of),
            (Point(0.0, 0.0, math.nan, "whole model"), *map(_point, _up_to(of, most))),
            series_colour(titles.index(of[0].model)),
            STATE_STYLES[of[0].state],
        )
        for of in cuts
    ]
    lost = line_chart(
        "loss_over_layers",
        lines,
        title="What each model loses over the share of its layers that go",
        text="The best cut of every size, of all criteria, with bands of one paired standard "
        "error, up to the first that leaves the figure. Dashed as it is cut, solid after a quick "
        "patch, dotted after a healing.",
        x=Axis("layers dropped", is_share=True),
        y=Axis("more than whole, nats a token"),
        references=[(sweep.loss, f"{sweep.loss:g} nats")],
        most=most,
    )
    names = [_named(of) for of in cuts]
    shares = [borne(of, sweep.losses) for of in cuts]
    series = [
        Line(
            f"{loss:g} nats",
            tuple(_share(row, names[row], of[place]) for row, of in enumerate(shares)),
            series_colour(place),
        )
        for place, loss in enumerate(sweep.losses)
    ]
    bears = dot_chart(
        "share_borne",
        names,
        series,
        title="Which share of its layers each model bears at a loss",
        text="Where the line through its best cuts first exceeds so many nats a token above the "
        "whole model, with half of what lies between the lines that are one standard error higher "
        "and lower. What has no bar reaches the largest size that was measured, and may bear more; "
        "of what lies below one layer nothing can go.",
        x=Axis("layers that can go", is_share=True),
    )
    return [lost, bears]


def scan_maps(found: Sequence[Found]) -> list[Drawing]:
    """Draw the heat map of every model, for one beside the other."""
    return [
        replace(
            heat_maps(one.scan)[0],
            name=f"heat_map_{place}",
            title=f"Blocks most alike: {one.title}",
        )
        for place, one in enumerate(found, 1)
        if one.scan is not None and one.starts
    ]


def start_charts(found: Sequence[Found]) -> list[Drawing]:
    """Draw where the most alike block starts, over its size, both as shares of the depth."""
    lines = []
    for place, one in enumerate(found):
        if one.scan is not None and one.starts:
            depth = one.scan.num_layers
            points = (
                Point(
                    start.n / depth,
                    start.start / depth,
                    math.nan if start.spread is None else start.spread / depth,
                    f"n = {start.n}, l* = {start.start} of {depth}",
                )
                for start in one.starts
            )
            lines.append(Line(one.title, tuple(points), series_colour(place)))
    if not lines:
        return []
    return [
        line_chart(
            "starts_over_depth",
            lines,
            title="Where the block starts whose ends are most alike",
            text="l* as a share of the depth, over the size of the block as a share of the depth; "
            "the band is one standard deviation of l* over resamples of the texts.",
            x=Axis("layers of the block", is_share=True),
            y=Axis("l*, as a share of the depth", is_share=True),
        )
    ]


def regret_charts(found: Sequence[Found]) -> list[Drawing]:
    """Draw the mean regret of every criterion over all sizes, a mark for each model."""
    groups = [one.group for one in found]
    means = [{} if group is None else mean_regrets(group) for group in groups]
    ordered = sorted(
        {name for one in means for name in one},
        key=lambda name: np.mean([one[name][0] for one in means if name in one]),
    )
    if not ordered:
        return []
    series = [
        Line(
            one.title,
            tuple(
                Point(row, *regrets[name], f"{one.title}, {name}")
                for row, name in enumerate(ordered)
                if name in regrets
            ),
            series_colour(place),
        )
        for place, (one, regrets) in enumerate(zip(found, means, strict=True))
        if regrets
    ]
    states = {group.when for group in groups if group is not None}
    return [
        dot_chart(
            "regret_by_model",
            ordered,
            series,
            title="The mean regret of each criterion, by model",
            text=f"Regret {' or '.join(sorted(states))}: what the choice of a criterion loses more "
            f"than the best one of its model and size, mean over sizes. The bar is the mean of the "
            f"sizes' paired standard errors, which that of the mean does not exceed.",
            x=Axis("mean regret, nats a token"),
            reference=(0.0, "the best"),
        )
    ]


def mean_regrets(group: Group) -> dict[str, tuple[float, float]]:
    """By criterion its mean regret over sizes, where all are known, and a bound of its error.

    Sizes are measured on the same texts: the error of their mean is at most the mean of theirs.
    """
    means = group.means()
    return {
        name: (regret, float(np.mean([one.regret.stderr for one in group.standings(name)])))
        for name, (_, regret) in means.items()
    }


def _named(cuts: Sequence[BestCut]) -> str:
    return f"{cuts[0].model}, {cuts[0].state}"


def _up_to(cuts: Sequence[BestCut], most: float) -> Sequence[BestCut]:
    """The cuts by size up to the first that loses more."""
    above = next((place for place, cut in enumerate(cuts) if cut.lost.mean > most), len(cuts))
    return cuts[: above + 1]


def _point(cut: BestCut) -> Point:
    lost, stderr = cut.lost.mean, cut.lost.stderr
    return Point(cut.share, lost, stderr, f"without {ranges(cut.dropped)}, by {cut.criterion}")


def _share(row: int, name: str, found: Borne) -> Point:
    return Point(row, found.share, found.stderr, f"{name}, at {found.loss:g} nats: {found}")
