"""``shallower gather``: the shards of a scan, or of an evaluation, put together."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Out, Overwrite
from .output import eval_names, say_eval, say_scan, warn


def gather_command(
    parts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PART...",
            help="Files of shards, or folders of them, as scan --shard and eval --shard write.",
        ),
    ],
    *,
    out: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put the shards of a scan or an eval together.

    All must be there, and of the same work. Of a scan it writes scan.safetensors, with the bytes of
    the scan that one process makes, and, where matplotlib is installed, heat_map.png; of an eval
    eval.json, what eval --json prints, and eval finds the result in the cache.
    """
    from ..runs.gather import gather_eval_into, gather_into
    from ..runs.store import open_store
    from ..values.files import EVAL_FILE
    from ..values.shard import kind_of

    if kind_of(parts) == "scan":
        say_scan(*gather_into(parts, out, overwrite=overwrite), as_json)
        return
    found = gather_eval_into(parts, out, store=open_store(), overwrite=overwrite)
    names = eval_names(found.model.name, found.plan)
    written = out / EVAL_FILE
    say_eval(
        found.values, found.model.dtype, found.plan, names=names, written=written, as_json=as_json
    )
    if None in found.inputs.values():
        warn(
            "eval will not find this in the cache: shards were measured on different machines, or "
            "by --no-cache"
        )
