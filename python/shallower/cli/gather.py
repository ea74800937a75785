"""``shallower gather``: the shards of a scan put together."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Out, Overwrite
from .output import say_scan


def gather_command(
    parts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PART...", help="Files of shards, or folders of them, as scan --shard writes."
        ),
    ],
    *,
    out: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put the shards of a scan together.

    All must be there, and of the same scan. Writes scan.safetensors, with the bytes of the scan
    that one process makes, and, where matplotlib is installed, heat_map.png.
    """
    from ..runs.gather import gather_into

    say_scan(*gather_into(parts, out, overwrite=overwrite), as_json)
