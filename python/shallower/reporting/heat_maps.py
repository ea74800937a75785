"""Heat maps of a scan, one panel each (2403.17887, fig. 4): rescaled rows, and raw with l*."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..scanning.scan import Scan
from .drawing import SETTINGS, WIDTH, Cells, Drawing, lay_out, marks_at, new_figure
from .figures import block_distances, require_matplotlib, rescale_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shares = Mapping[int, float]
"""By block size the share of resamples in which the best block starts at l*."""


def heat_maps(scan: Scan, shares: Shares | None = None) -> list[Drawing]:
    """Draw the angular distances of all blocks twice: rows rescaled as in the paper, and raw.

    Args:
        scan: by the angle, of two layers or more.
        shares: how stable l* is, by block size; the size of its ring in the raw map.

    Returns:
        Two figures; none of a scan without angles, or of a single layer.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    if "angular" not in scan.metrics or scan.num_layers < 2:
        return []
    rows = block_distances(scan.mean("angular"))
    starts = [scan.best_block(n, "angular").start for n in range(1, scan.num_layers)]
    best = "A ring marks l*, the start of the block whose ends are most alike"
    rescaled = _heat_map(
        rows, rescale_rows(rows), starts, None, name="heat_map_rescaled",
        title="Which blocks are most alike at their ends, size by size",
        label="angular distance, each row rescaled to [0, 1]",
        text=f"{best}. Every row of blocks of n layers is rescaled to its own range, as in the "
        f"paper: dark is the most alike block of its size.",
    )  # fmt: skip
    sized = "" if shares is None else (
        "; a full ring was found in every resample of the texts, a small one in few"
    )  # fmt: skip
    raw = _heat_map(
        rows, rows, starts, shares, name="heat_map_raw",
        title="How alike the ends of each block are", label="angular distance",
        text=f"{best}{sized}. Colour is the mean angular distance between the state before the "
        f"block and the state behind it: dark blocks turn the state least.",
    )  # fmt: skip
    return [rescaled, raw]


def _heat_map(
    rows: NDArray[np.float64],
    values: NDArray[np.float64],
    starts: list[int],
    shares: Shares | None,
    **words: Any,
) -> Drawing:
    import matplotlib

    label = words.pop("label")
    sizes = np.arange(1, len(rows) + 1)
    with matplotlib.rc_context(SETTINGS):
        figure, axes = new_figure(WIDTH * 0.9)
        extent = (-0.5, rows.shape[1] - 0.5, 0.5, rows.shape[0] + 0.5)
        image = axes.imshow(
            values, origin="lower", aspect="auto", cmap="viridis", extent=extent,
            interpolation="none",
        )  # fmt: skip
        axes.grid(visible=False)
        ring = max(8.0, (0.8 * 72 * 0.78 * WIDTH / rows.shape[1]) ** 2)  # 0.8 of a cell
        area = [ring * (1 if shares is None else max(0.12, shares[int(n)])) for n in sizes]
        for colour, width in (("white", 2.0), ("#e0003c", 1.0)):
            axes.scatter(starts, sizes, s=area, facecolors="none", edgecolors=colour, lw=width)
        axes.set_xlabel("first dropped layer l, from 0")
        axes.set_ylabel("layers dropped n, block [l, l+n)")
        _whole_ticks(axes)
        bar = figure.colorbar(image, ax=axes, location="top", aspect=34, pad=0.02)
        bar.set_label(label)
        bar.outline.set_visible(False)
        lay_out(figure)
        cells = _cells(axes, rows)
    head = ("n", "l*", "angular distance", *(() if shares is None else ("share of resamples",)))
    numbers = tuple(
        (str(n), str(start), f"{rows[n - 1, start]:.4f}")
        + (() if shares is None else (f"{100 * shares[int(n)]:.0f} %",))
        for n, start in zip(sizes, starts, strict=True)
    )
    return Drawing(**words, figure=figure, cells=cells, head=head, numbers=numbers)


def _whole_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(7, integer=True))


def _cells(axes: "Axes", rows: NDArray[np.float64]) -> Cells:
    """Where the cells lie, and the distance of each."""
    first, last = marks_at(axes, [(-0.5, 0.5, ""), (rows.shape[1] - 0.5, rows.shape[0] + 0.5, "")])
    values = tuple(
        tuple(round(float(value), 4) for value in row if np.isfinite(value)) for row in rows
    )
    return Cells(
        first.x, first.y, (last.x - first.x) / rows.shape[1], (first.y - last.y) / rows.shape[0],
        values,
    )  # fmt: skip
