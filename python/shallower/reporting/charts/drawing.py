"""A figure and its words: the look that all share, and the figure as SVG, PNG or part of a page."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MissingExtraError
from ...storage import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6
"""Inches of a figure's width: one column of a paper, and readable on a phone."""

DPI = 220

COLOURS = {
    "ink": "#1b1f24", "muted": "#57606b", "rule": "#dfe3e8", "paper": "#fefefe",
    "blue": "#0b66b3", "orange": "#b8500f", "green": "#0d7a57", "violet": "#7d4fa6",
    "pink": "#b0377a", "olive": "#736a12",
}  # fmt: skip
"""The colours of figures by name in the page's style sheet, which has others on dark paper."""

SERIES = ("blue", "orange", "green", "violet", "pink", "olive")
"""Colours of lines, in their order."""

SETTINGS: Any = {
    "svg.hashsalt": "shallower",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # names are no formulas
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "grid.color": COLOURS["rule"],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
}
"""Of matplotlib, while a figure is made and written."""

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def require_matplotlib(purpose: str) -> None:
    """Raise MissingExtraError, which names the purpose, where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "figures", purpose)


Mark = tuple[float, float, str]
"""A text that is shown under the pointer, so many points from the left and the upper edge."""

Grid = tuple[float, float, float, float]
"""The first cell's left and lower side, in points from the left and the upper edge, and its size
in points, (width, height)."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of matplotlib, and its words."""

    name: str  # of its files, and in the page
    title: str  # a headline
    text: str  # alternative text
    figure: "Figure"
    marks: tuple[Mark, ...] = ()  # texts at its points
    grid: Grid | None = None  # of the cells of a heat map
    rows: tuple[tuple[float, ...], ...] = ()  # their values; rows may become shorter
    head: tuple[str, ...] = ()  # columns of `numbers`
    numbers: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    _files: dict[str, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def save(self, folder: Path) -> list[Path]:
        """Write the figure as SVG and as PNG; the same figure gives the same bytes."""
        written = []
        for kind in ("svg", "png"):
            path = folder / f"{self.name}.{kind}"
            write_file(path, self.rendered(kind))
            written.append(path)
        return written

    def inline(self) -> str:
        """Give an ``svg`` element in the page's style; identifiers begin with the figure's name."""
        svg = self.rendered("svg").decode()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r"<title>.*?</title>", "", svg, count=1, flags=re.DOTALL)
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = svg.replace("url(#", f"url(#{self.name}-").replace('href="#', f'href="#{self.name}-')
        for name, colour in COLOURS.items():
            svg = svg.replace(colour, f"var(--{name})")
        svg = re.sub(r"'DejaVu Sans'[^;\"]*", _FONTS, svg)
        head = f'<svg role="img" aria-labelledby="{self.name}-t {self.name}-d" '
        words = (
            f'<title id="{self.name}-t">{escape(self.title)}</title>'
            f'<desc id="{self.name}-d">{escape(self.text)}</desc>'
        )
        start, rest = svg[4:].split(">", 1)
        start = re.sub(r'\b(width|height)="[^"]*"', "", start)
        return f"{head}{' '.join(start.split())}>{words}{rest.strip()}"

    def rendered(self, kind: str) -> bytes:
        """Render the figure once as ``svg`` or ``png``."""
        if kind not in self._files:
            self._files[kind] = render(self.figure, kind, title=self.title, text=self.text)
        return self._files[kind]


def render(figure: "Figure", kind: str, *, title: str, text: str = "") -> bytes:
    """Render a figure as ``svg`` or ``png``, without a date, so that its bytes are the same."""
    import matplotlib

    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Title": title, "Description": text}
    metadata |= {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(SETTINGS), _any_letters():
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata, facecolor=COLOURS["paper"])
    return buffer.getvalue()


@contextmanager
def _any_letters() -> Iterator[None]:
    """Let names have letters that the font lacks: a box is drawn for each, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def new_figure(height: float) -> tuple["Figure", "Axes"]:
    """Make a figure of one panel, a column wide and so many inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
    return figure, figure.subplots()


def lay_out(figure: "Figure") -> None:
    """Lay out a complete figure of constrained layout; no later drawing lays it out again."""
    engine = figure.get_layout_engine()
    assert engine is not None
    with _any_letters():
        engine.execute(figure)
    figure.set_layout_engine("none")


def marks_at(axes: "Axes", points: Sequence[Mark]) -> tuple[Mark, ...]:
    """Find where points lie in a figure that is laid out: a mark for each (x, y, text)."""
    figure = axes.figure
    height = figure.get_figheight() * 72  # type: ignore[union-attr]
    low, high = sorted(axes.get_ylim())
    found = []
    for x, y, text in points:
        right, up = axes.transData.transform((x, min(max(y, low), high)))
        found.append((round(float(right), 1), round(height - float(up), 1), text))
    return tuple(found)
