"""``shallower gather``: the shards of a scan or of a comparison put together."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Out, Overwrite
from .output import say_scan


def gather_command(
    parts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PART...", help="Files of shards, or folders of them, as --shard writes."
        ),
    ],
    *,
    out: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> int:
    """Put the shards of a scan or of a comparison together.

    All must be there, and of the same work. Writes scan.safetensors, with the bytes of the scan
    that one process makes, and, where matplotlib is installed, heat_map.png; or the comparison,
    whose model is loaded for its shape, and measures nothing.
    """
    from ..runs.study_units import gather_study, shards_of_study

    if shards := shards_of_study(parts):
        from .compare import say_comparison

        study, comparison = gather_study(shards, out, overwrite=overwrite)
        return say_comparison(comparison, study, as_json)
    from ..runs.gather import gather_into

    say_scan(*gather_into(parts, out, overwrite=overwrite), as_json)
    return 0
