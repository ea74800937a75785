"""Reports: the page of whatever a folder holds, a run or a comparison."""

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError, OutputError, ShallowerError, why
from ..progress import track
from ..results.comparison import CriteriaComparison, scan_place
from ..results.gain import Gain
from ..values.files import (
    COMPARISON_FILE,
    GAIN_FILE,
    REPORT_FILE,
    RESULTS_FILE,
)
from ..values.schema import of_type
from .results import Run
from .story import Story
from .writers.page import shows_figures, write_page

if TYPE_CHECKING:
    from ..scanning.scan import Scan


def report(
    folder: str | Path, out: str | Path | None = None, *, progress: bool | None = None
) -> Path:
    """Write the page of a run or of a comparison.

    The page is one HTML file that needs no network. It holds what was cut, how sure that is, what
    it costs and gains, and figures. Every number has its source, and the commands that make it
    again. Markdown and JSON are written beside it, and the figures into ``figures/`` as SVG and
    PNG. Without matplotlib the page has no figures. What is there is replaced, but a page with
    figures not by one without.

    Args:
        folder: what :func:`run`, :func:`compare` or :func:`curve` has written.
        out: the place of the page; ``report.html`` in the folder by default.
        progress: True for a bar on standard error, False for silence; by default a bar on a
            terminal, and lines in a log.

    Returns:
        The place of the page.

    Raises:
        OutputError: the folder holds no results, they are damaged, or nothing is recommended yet;
            the place cannot be written to, or files beside it belong to no page.
        ScanError, ModelError: the scan of a run, or the record of its healing, is damaged.

    Example:
        >>> done = sh.run(model, tokenizer, texts, eval_texts=held_out, out="runs/page", n=2)
        >>> sh.report("runs/page").name
        'report.html'
    """
    return save_report(Path(folder), out, progress, keeps_figures=True)[0]


def save_report(
    folder: Path,
    out: str | Path | None = None,
    progress: bool | None = None,
    *,
    keeps_figures: bool = False,
) -> tuple[Path, Story]:
    """Write the page as :func:`report`, and give its story too.

    With ``keeps_figures`` a page with figures is not replaced by one without, of new results.
    """
    page = folder / REPORT_FILE if out is None else Path(out)
    if page.is_dir() or page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{page}: expected the place of a page, as page.html (out, --out)")
    make, drawn = _read_results(folder), find_spec("matplotlib") is not None
    if keeps_figures and shows_figures(page) and not drawn:
        kept = f"{page} has figures, and is not replaced by a page without: drawing them"
        raise OutputError(str(MissingExtraError("matplotlib", "figures", kept)))
    if not drawn:
        none = "the page has no figures: drawing them"
        warnings.warn(str(MissingExtraError("matplotlib", "figures", none)), stacklevel=3)
    with track("page", 2, progress) as advance:
        advance(0, "figures")
        story = make(drawn=drawn)
        advance(1, "files")
        write_page(story, page)
        advance(1)
    return page, story


def read_story(folder: Path, *, drawn: bool) -> Story:
    """Read the results in a folder as a story, with figures if ``drawn``."""
    return _read_results(folder)(drawn=drawn)


def _read_results(folder: Path) -> Callable[..., Story]:
    """Read what a folder holds; the story is made of it, with figures if ``drawn``."""
    name = folder.resolve().name
    if (folder / RESULTS_FILE).is_file():
        from .stories.run import run_story

        done = Run.load(folder)
        if done.recommended is None:
            raise OutputError(
                f"{folder} holds a run that has not ended: call shallower run again to resume it"
            )
        return partial(run_story, done, gain=_gain(folder))
    if (folder / COMPARISON_FILE).is_file():
        from .stories.comparison import comparison_story

        data = _read(folder / COMPARISON_FILE)
        comparison = _parsed(CriteriaComparison, data, folder / COMPARISON_FILE)
        command = str(data.get("command", ""))
        scans = read_scans(folder, comparison)
        how: Any = {"command": command, "folder": name, "scans": scans}
        return partial(comparison_story, comparison, **how)
    raise OutputError(
        f"{folder} holds no results: expected the folder of a run ({RESULTS_FILE}) or of a "
        f"comparison ({COMPARISON_FILE})"
    )


def read_scans(folder: Path, comparison: CriteriaComparison) -> "dict[str, Scan]":
    """Read the scans of a comparison that are there, by the titles of model and texts."""
    from ..scanning.scan import Scan
    from .charts.models import titled_starts

    titles = iter([title for title, _, _ in titled_starts(comparison.models)])
    found = {}
    for model in comparison.models:
        for texts in model.starts:
            title, place = next(titles), folder / scan_place(model.name, texts)
            if place.is_file():
                found[title] = Scan.load(place)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return of_type(dict, json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read, or is damaged: {why(error, path)}") from error


def _parsed(kind: Any, data: Mapping[str, Any], path: Path) -> Any:
    try:
        return kind.from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError, ShallowerError) as error:
        raise OutputError(f"{path} is damaged: {why(error)}") from error


def _gain(folder: Path) -> Gain | None:
    """What a cut gains, where that is known."""
    path = folder / GAIN_FILE
    return _parsed(Gain, _read(path), path) if path.is_file() else None
