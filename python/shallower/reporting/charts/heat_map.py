"""Heat maps of a scan (2403.17887, fig. 4): rows rescaled, and raw, with rings at l*."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import LayersError, MissingExtraError
from ...scanning.scan import Scan
from ...storage import write_file
from ...values.counts import counted
from ...values.files import HEAT_MAP_FILE
from .drawing import (
    SETTINGS,
    WIDTH,
    Drawing,
    Grid,
    lay_out,
    marks_at,
    new_figure,
    render,
    require_matplotlib,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shares = Mapping[int, float]
"""By block size the share of resamples in which the best block starts at l*."""

COLOURS = "viridis_r"
"""From yellow, alike, to purple, as the paper has them (2403.17887, fig. 4)."""

_LABELS = "angular distance, each row rescaled to [0, 1]", "angular distance"


def block_distances(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sort the (L+1, L+1) mean distances of pairs of states by block: (L-1, L).

    Row n-1 and column l hold d(l, l+n), NaN where the block would pass the last layer.
    """
    num_layers = len(mean) - 1
    rows = np.full((num_layers - 1, num_layers), np.nan)
    for n in range(1, num_layers):
        rows[n - 1, : num_layers - n + 1] = np.diagonal(mean, n)
    return rows


def rescale_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rescale every row to [0, 1] as in the paper; equal values become zeros, NaN stays."""
    least = np.nanmin(rows, axis=1, keepdims=True)
    spread = np.nanmax(rows, axis=1, keepdims=True) - least
    return (rows - least) / np.where(spread > 0, spread, 1)


def save_heat_map(scan: Scan, path: str | Path, title: str = "") -> None:
    """Draw angular distances over first dropped layer and block size, as PNG.

    On the left the rows are rescaled as in the paper, on the right they are raw; a ring
    marks l*(n), the block that :meth:`Scan.best_block` gives.

    Args:
        scan: a scan by the angle, of at least two layers.
        path: the file to write, PNG whatever its name.
        title: stands before the numbers of layers and samples; a model's name, say.

    Raises:
        MetricError: the scan has no angular distances.
        MissingExtraError: matplotlib is not installed.
        LayersError: the model has a single layer.
        OutputError: the place cannot be written to.
    """
    require_matplotlib("drawing the heat map")
    import matplotlib
    from matplotlib.figure import Figure

    if scan.num_layers < 2:
        raise LayersError(
            "the scan is of one layer: expected two or more, so that a block can be dropped"
        )
    rows, starts = block_distances(scan.mean("angular")), _best_starts(scan)
    samples = f"{counted(scan.num_layers, 'layer')}, {counted(scan.num_samples, 'sample')}"
    words = f"{title}: {samples}" if title else samples
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(2 * WIDTH, 0.95 * WIDTH), dpi=72, layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, values, label in zip(panels, (rescale_rows(rows), rows), _LABELS, strict=True):
            _draw_panel(axes, values, starts, label)
        panels[1].set_ylabel("")
        figure.suptitle(words)
    write_file(Path(path), render(figure, "png", title=words))


def draw_heat_map(scan: Scan, folder: str | Path) -> list[Path]:
    """Write ``heat_map.png`` into the folder of a scan of several layers that has angles."""
    if "angular" not in scan.metrics or scan.num_layers < 2:
        return []
    path = Path(folder) / HEAT_MAP_FILE
    try:
        save_heat_map(scan, path, scan.model.name if scan.model else "")
    except MissingExtraError as error:
        warnings.warn(str(error), stacklevel=2)
        return []
    return [path]


def heat_maps(scan: Scan, shares: Shares | None = None) -> list[Drawing]:
    """Draw the angular distances of all blocks twice: rows rescaled as in the paper, and raw.

    ``shares`` sizes the rings of the raw map by how stable l* is.
    """
    require_matplotlib("drawing the heat map")
    if "angular" not in scan.metrics or scan.num_layers < 2:
        return []
    rows, starts = block_distances(scan.mean("angular")), _best_starts(scan)
    best = "A ring marks l*, the start of the block whose ends are most alike"
    sized = ""
    if shares is not None:
        sized = "; a full ring was found in every resample of the texts, a small one in few"
    words = (
        (
            "heat_map_rescaled",
            "Which blocks are most alike at their ends, size by size",
            f"{best}. Every row of blocks of n layers is rescaled to its own range, as in the "
            f"paper: yellow is the most alike block of its size.",
        ),
        (
            "heat_map_raw",
            "How alike the ends of each block are",
            f"{best}{sized}. Colour is the mean angular distance between the state before the "
            f"block and the state behind it: yellow blocks turn the state least.",
        ),
    )
    return [
        _drawing(*words[0], rows, rescale_rows(rows), starts, None, _LABELS[0]),
        _drawing(*words[1], rows, rows, starts, shares, _LABELS[1]),
    ]


def _best_starts(scan: Scan) -> list[int]:
    return [scan.best_block(n, "angular").start for n in range(1, scan.num_layers)]


def _drawing(
    name: str,
    title: str,
    text: str,
    rows: NDArray[np.float64],
    values: NDArray[np.float64],
    starts: Sequence[int],
    shares: Shares | None,
    label: str,
) -> Drawing:
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        figure, axes = new_figure(WIDTH * 0.9)
        _draw_panel(axes, values, starts, label, shares)
        lay_out(figure)
        grid = _grid(axes, *rows.shape)
    head: tuple[str, ...] = ("n", "l*", "angular distance")
    numbers: list[tuple[str, ...]] = [
        (str(n), str(start), f"{rows[n - 1, start]:.4f}") for n, start in enumerate(starts, 1)
    ]
    if shares is not None:
        head += ("share of resamples",)
        numbers = [(*row, f"{100 * shares[int(row[0])]:.0f} %") for row in numbers]
    known = tuple(
        tuple(round(float(value), 4) for value in row if np.isfinite(value)) for row in rows
    )
    return Drawing(name, title, text, figure, (), grid, known, head, tuple(numbers))


def _draw_panel(
    axes: "Axes",
    values: NDArray[np.float64],
    starts: Sequence[int],
    label: str,
    shares: Shares | None = None,
) -> None:
    """Draw one heat map: (L-1, L) values, a ring at the best start of every block size."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sizes = range(1, len(values) + 1)
    extent = (-0.5, values.shape[1] - 0.5, 0.5, values.shape[0] + 0.5)
    image = axes.imshow(
        values, origin="lower", aspect="auto", cmap=COLOURS, extent=extent, interpolation="none"
    )
    axes.grid(visible=False)
    ring = max(8.0, (0.8 * 72 * 0.78 * WIDTH / values.shape[1]) ** 2)  # 0.8 of a cell
    area = [ring * (1 if shares is None else max(0.12, shares[n])) for n in sizes]
    for colour, width in (("white", 2.0), ("#e0003c", 1.0)):
        axes.scatter(starts, sizes, s=area, facecolors="none", edgecolors=colour, lw=width)
    axes.set_xlabel("first dropped layer l, from 0")
    axes.set_ylabel("layers dropped n, block [l, l+n)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(7, integer=True))
    figure = axes.figure
    assert isinstance(figure, Figure)
    bar = figure.colorbar(image, ax=axes, location="top", aspect=34, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _grid(axes: "Axes", num_rows: int, num_columns: int) -> Grid:
    """Find where the cells lie."""
    ends = [(-0.5, 0.5, ""), (num_columns - 0.5, num_rows + 0.5, "")]
    (left, bottom, _), (right, top, _) = marks_at(axes, ends)
    return left, bottom, (right - left) / num_columns, (bottom - top) / num_rows
