"""Figures by matplotlib: the heat map of a scan (2403.17887, fig. 4), the curve of a healing."""

import io
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import LayersError, MissingExtraError
from ..scanning.scan import Scan
from ..storage import write_file
from ..values.healing import Healing

HEAT_MAP_FILE = "heat_map.png"


def block_distances(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sort mean distances of pairs of states by block.

    Args:
        mean: (L+1, L+1) float64, the mean distance of every pair of states.

    Returns:
        (L-1, L) float64, row n-1 and column l holding d(l, l+n), NaN where the block would pass
        the last layer.
    """
    num_layers = len(mean) - 1
    rows = np.full((num_layers - 1, num_layers), np.nan)
    for n in range(1, num_layers):
        rows[n - 1, : num_layers - n + 1] = np.diagonal(mean, n)
    return rows


def rescale_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift and rescale every row to [0, 1], as the paper does for display.

    Args:
        rows: (L-1, L) float64 of :func:`block_distances`.

    Returns:
        The same shape; a row of equal values becomes zeros, NaN stays.
    """
    least = np.nanmin(rows, axis=1, keepdims=True)
    spread = np.nanmax(rows, axis=1, keepdims=True) - least
    return (rows - least) / np.where(spread > 0, spread, 1)


def require_matplotlib(purpose: str = "drawing the heat map") -> None:
    """Refuse to draw where there is no matplotlib.

    Args:
        purpose: what it is needed for, as the error says it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "figures", purpose)


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
    require_matplotlib()
    from matplotlib.figure import Figure

    if scan.num_layers < 2:
        raise LayersError(
            "the scan is of one layer: expected two or more, so that a block can be dropped"
        )
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


def draw_heat_map(scan: Scan, folder: str | Path) -> list[Path]:
    """Draw the heat map of a scan beside it, where that can be done.

    Args:
        scan: any scan; one without angles, or of one layer, has no heat map.
        folder: the folder for ``heat_map.png``.

    Returns:
        The files written: one, or none. Without matplotlib there is none, with a warning.

    Raises:
        OutputError: the place cannot be written to.
    """
    if "angular" not in scan.metrics or scan.num_layers < 2:
        return []
    path = Path(folder) / HEAT_MAP_FILE
    try:
        save_heat_map(scan, path, scan.model.name if scan.model else "")
    except MissingExtraError as error:
        warnings.warn(str(error), stacklevel=2)
        return []
    return [path]


def smoothed(values: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """Smooth values by an exponential moving average, without the pull of its start.

    Args:
        values: (steps,) float64.
        weight: what a value counts of the one after it, in [0, 1).

    Returns:
        (steps,) float64, the weighted mean of the values so far.
    """
    sums = norms = 0.0
    means = []
    for value in values:
        sums, norms = weight * sums + value, weight * norms + 1.0
        means.append(sums / norms)
    return np.array(means)


def healing_curve(healing: Healing) -> bytes:
    """Draw the losses of a healing over its steps.

    Args:
        healing: the record of a healing.

    Returns:
        A PNG: the training loss, smoothed, and the held-out one with its standard error; lines
        for the cut and the uncut model.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib("drawing the curve of a healing")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps = [step.step for step in healing.steps]
    losses = np.array([step.loss for step in healing.steps])
    axes.plot(steps, losses, color="0.8", linewidth=0.8)
    weight = min(0.98, max(0.5, 1 - 10 / max(1, len(losses))))
    axes.plot(steps, smoothed(losses, weight), color="0.5", label="training, smoothed")
    if healing.held_out:
        at = [measured.step for measured in healing.held_out]
        nats = np.array([measured.loss.nats for measured in healing.held_out])
        error = np.nan_to_num([measured.loss.stderr for measured in healing.held_out])
        axes.plot(at, nats, "o-", color="crimson", label="held out ± standard error")
        axes.fill_between(at, nats - error, nats + error, color="crimson", alpha=0.15, linewidth=0)
    lines = (
        ("unpatched", healing.cut, "-."),
        ("before healing", healing.before, "--"),
        ("uncut", healing.original, ":"),
    )
    for label, loss, style in lines:
        if loss is not None:
            axes.axhline(loss.nats, color="black", linestyle=style, linewidth=1, label=label)
    axes.set_xlabel("steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss, nats a token")
    axes.set_title(f"{healing.model.name}, step {healing.best_step} kept")
    axes.legend(loc="upper right", framealpha=1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
