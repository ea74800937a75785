"""``shallower report``: the page of what is already there."""

from pathlib import Path
from typing import Annotated

import typer

from ..settings.options import Option
from .options import Json
from .output import print_json, show


def report_command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder of a run or a comparison."),
    ],
    *,
    out: Annotated[
        Path | None,
        Option("Place of the page; DIR/report.html by default.", "PAGE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the page of a run or a comparison.

    One HTML file that needs no network; Markdown and JSON beside it, and the figures as SVG and
    PNG in figures/, where matplotlib is installed. What is there is replaced.
    """
    from ..reporting.report import report

    page = report(folder, out)
    if as_json:
        print_json({"page": str(page)})
    else:
        show(f"page: {page}")
