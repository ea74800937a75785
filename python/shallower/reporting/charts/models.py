"""Figures of several models: what each bears, heat maps, l* over depth, and criteria's regret."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...results.comparison import LOSSES, Borne, ComparedModel, RankedCut, Start, borne
from ...scanning.scan import Scan
from ...settings.studies import State
from ...values.layers import ranges
from .comparison import STATE_STYLES, Group
from .drawing import Drawing
from .heat_map import heat_maps
from .plots import Axis, Line, Point, dot_chart, line_chart, series_colour


def best_cuts(group: Group, state: State) -> list[RankedCut]:
    """The cut of least loss of every size in a state, of those that were measured."""
    found: dict[float, RankedCut] = {}
    for n in group.sizes:
        for row, one in group.ranked(n, state):
            best = found.get(row.layers_share)
            if best is None or one.difference.mean < best[1].difference.mean:
                found[row.layers_share] = replace(row, model=group.title), one
    return [found[share] for share in sorted(found)]


def all_cuts(groups: Sequence[Group]) -> list[list[RankedCut]]:
    """The best cuts of every model and state that has some."""
    of = [best_cuts(group, state) for group in groups for state in group.states]
    return [cuts for cuts in of if cuts]


def borne_charts(groups: Sequence[Group]) -> list[Drawing]:
    """Draw the loss of the best cuts over the share of layers, and the share borne at a loss."""
    cuts = all_cuts(groups)
    if not cuts:
        return []
    titles = [one.title for one in groups]
    most = 2 * max(LOSSES)
    lines = [
        Line(
            _named(of),
            (Point(0.0, 0.0, math.nan, "whole model"), *map(_point, _up_to(of, most))),
            series_colour(titles.index(of[0][0].model)),
            STATE_STYLES[of[0][0].state],
        )
        for of in cuts
    ]
    lost = line_chart(
        "more_than_whole",
        lines,
        title="What each model loses over the share of its layers that go",
        text="The best cut of every size, of all criteria, with bands of one paired standard "
        "error, up to the first that leaves the figure. Dashed as it is cut, solid after a "
        "patch, dotted after a healing.",
        x=Axis("layers dropped", is_share=True),
        y=Axis("more than whole, nats a token"),
        references=[(LOSSES[1], f"{LOSSES[1]:g} nats")],
        most=most,
    )
    names = [_named(of) for of in cuts]
    shares = [borne(of) for of in cuts]
    series = [
        Line(
            f"{loss:g} nats",
            tuple(_share(row, names[row], of[place]) for row, of in enumerate(shares)),
            series_colour(place),
        )
        for place, loss in enumerate(LOSSES)
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


def scan_maps(scans: Mapping[str, Scan]) -> list[Drawing]:
    """Draw the heat map of every model, one beside the other; scans are by their titles."""
    return [
        replace(heat_maps(scan)[0], name=f"heat_map_{place}", title=f"Blocks most alike: {title}")
        for place, (title, scan) in enumerate(scans.items(), 1)
    ]


def titled_starts(
    models: Sequence[ComparedModel],
) -> list[tuple[str, ComparedModel, tuple[Start, ...]]]:
    """The starts of every model and calibration text, with their titles."""
    several = any(len(model.starts) > 1 for model in models)
    return [
        (f"{model.title}, on {texts}" if several else model.title, model, starts)
        for model in models
        for texts, starts in model.starts.items()
    ]


def start_charts(models: Sequence[ComparedModel]) -> list[Drawing]:
    """Draw where the most alike block starts, over its size, both as shares of the depth."""
    lines = []
    for place, (title, model, starts) in enumerate(titled_starts(models)):
        depth = model.num_layers
        points = (
            Point(
                start.n / depth,
                start.start / depth,
                math.nan if start.spread is None else start.spread / depth,
                f"n = {start.n}, l* = {start.start} of {depth}",
            )
            for start in starts
        )
        lines.append(Line(title, tuple(points), series_colour(place)))
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


def regret_charts(groups: Sequence[Group]) -> list[Drawing]:
    """Draw the mean regret of every criterion over all sizes, a mark for each model."""
    means = [mean_regrets(group) for group in groups]
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
        for place, (one, regrets) in enumerate(zip(groups, means, strict=True))
        if regrets
    ]
    states = {group.when for group in groups}
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


def _named(cuts: Sequence[RankedCut]) -> str:
    return f"{cuts[0][0].model}, {cuts[0][0].state}"


def _up_to(cuts: Sequence[RankedCut], most: float) -> Sequence[RankedCut]:
    """The cuts by size up to the first that loses more."""
    losses = [standing.difference.mean for _, standing in cuts]
    above = next((place for place, lost in enumerate(losses) if lost > most), len(cuts))
    return cuts[: above + 1]


def _point(ranked: RankedCut) -> Point:
    cut, lost = ranked[0], ranked[1].difference
    what = f"without {ranges(cut.dropped)}, by {cut.criterion}"
    return Point(cut.layers_share, lost.mean, lost.stderr, what)


def _share(row: int, name: str, found: Borne) -> Point:
    return Point(row, found.share, found.stderr, f"{name}, at {found.loss:g} nats: {found}")
