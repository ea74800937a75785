"""Figures of criteria that were compared, into a folder."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage import write_file
from ..values.comparison import CriteriaComparison
from .criteria_styles import DPI, groups_of, styles_of
from .figures import require_matplotlib
from .loss_figure import losses_figure
from .regret_figure import regrets_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_FIGURE = "loss_over_dropped"
REGRET_FIGURE = "regret_over_cost"

SETTINGS: Any = {
    "svg.hashsalt": "shallower",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "text.parse_math": False,  # names are no formulas
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
"""Of matplotlib, while the figures are made."""

_LOSS_TEXT = (
    "Loss in nats a token over the share of layers (left) and of parameters (right) that a "
    "criterion drops, before and after a quick patch; lines for the whole model and for a uniform "
    "guess. Each line is a criterion."
)
_REGRET_TEXT = (
    "Mean regret of each criterion over all sizes, against the layer-forwards that its choices "
    "cost. A line joins those that no other beats in both."
)


def draw_comparison(comparison: CriteriaComparison, folder: str | Path) -> list[Path]:
    """Draw losses over what is dropped, and regret over cost; each as SVG and as PNG.

    The same comparison gives the same bytes.

    Args:
        comparison: of criteria, on one model or several.
        folder: where ``loss_over_dropped`` and ``regret_over_cost`` are written.

    Returns:
        The files; none where no model was compared.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the place cannot be written to.
    """
    require_matplotlib("drawing a comparison")
    import matplotlib

    groups = groups_of(comparison)
    if not groups:
        return []
    styles = styles_of(comparison)
    written = []
    with matplotlib.rc_context(SETTINGS):
        for name, figure, text in (
            (LOSS_FIGURE, losses_figure(groups, styles), _LOSS_TEXT),
            (REGRET_FIGURE, regrets_figure(groups, styles, comparison.unit), _REGRET_TEXT),
        ):
            for kind in ("svg", "png"):
                path = Path(folder) / f"{name}.{kind}"
                write_file(path, _rendered(figure, kind, name.replace("_", " "), text))
                written.append(path)
    return written


def _rendered(figure: "Figure", kind: str, title: str, text: str) -> bytes:
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Title": title, "Description": text}
    metadata |= {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()
