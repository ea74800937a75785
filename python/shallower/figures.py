"""The heat map of a scan (2403.17887, fig. 4). The one room that knows matplotlib."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import LayersError, MissingExtraError
from .similarity import Scan
from .storage import write_file


def block_distances(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean distances by block: (L+1, L+1) to (L-1, L), row n-1 and column l holding
    d(l, l+n), NaN where the block would pass the last layer.
    """
    num_layers = len(mean) - 1
    rows = np.full((num_layers - 1, num_layers), np.nan)
    for n in range(1, num_layers):
        rows[n - 1, : num_layers - n + 1] = np.diagonal(mean, n)
    return rows


def rescale_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift and rescale every row to [0, 1], as the paper does for display; a row of equal
    values becomes zeros.
    """
    least = np.nanmin(rows, axis=1, keepdims=True)
    spread = np.nanmax(rows, axis=1, keepdims=True) - least
    return (rows - least) / np.where(spread > 0, spread, 1)


def require_matplotlib() -> None:
    """Raise MissingExtraError where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "figures", "drawing the heat map")


def save_heat_map(scan: Scan, path: str | Path, title: str = "") -> None:
    """Draw angular distances over first dropped layer and block size, as PNG.

    On the left the rows are rescaled as in the paper, on the right they are raw; a ring
    marks l*(n), the block that :meth:`Scan.best_block` gives.

    Raises:
        MissingExtraError: matplotlib is not installed.
        LayersError: the model has a single layer.
        OutputError: the place cannot be written to.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    if scan.num_layers < 2:
        raise LayersError("a model of one layer has no block that could be dropped")
    rows = block_distances(scan.mean("angular"))
    sizes = np.arange(1, scan.num_layers)
    starts = [scan.best_block(int(n), "angular").start for n in sizes]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels = (
        (left, rescale_rows(rows), "rows rescaled to [0, 1]"),
        (right, rows, "angular distance"),
    )
    for axes, values, label in panels:
        extent = (-0.5, rows.shape[1] - 0.5, 0.5, rows.shape[0] + 0.5)
        image = axes.imshow(
            values, origin="lower", aspect="auto", cmap="viridis_r", extent=extent,
            interpolation="nearest",
        )  # fmt: skip
        axes.scatter(starts, sizes, s=16, facecolors="none", edgecolors="crimson", label="l*(n)")
        axes.set_xlabel("first dropped layer l (0-based)")
        axes.set_title(label)
        figure.colorbar(image, ax=axes)
    left.set_ylabel("layers dropped n, block [l, l+n)")
    right.legend(loc="upper right")
    samples = f"{scan.num_layers} layers, {scan.num_samples} samples"
    figure.suptitle(f"{title}: {samples}" if title else samples)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_file(Path(path), buffer.getvalue())
