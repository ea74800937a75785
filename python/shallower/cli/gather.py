"""``shallower gather``: the shards of a scan, an evaluation or a comparison put together."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Out, Overwrite, TrustRemoteCode
from .output import eval_names, say_eval, say_scan, warn


def gather_command(
    parts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PART", help="Files of shards, or folders of them, as --shard writes."
        ),
    ],
    *,
    out: Out,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> int:
    """Put the shards of a scan, an eval or a comparison together.

    All must be there, and of the same work. From a scan it writes scan.safetensors, with the bytes
    that one process would write, and heat_map.png if matplotlib is installed. From an eval it
    writes eval.json, as eval --json prints it, and caches the result. From a comparison it writes
    all that compare does: the model is loaded for its shape, and nothing is measured.
    """
    from ..sharing.eval_shards import gather_eval_into
    from ..sharing.gather import gather_into
    from ..store.store import open_store
    from ..values.files import EVAL_FILE
    from ..values.shard import kind_of

    kind = kind_of(parts)
    if kind == "scan":
        say_scan(*gather_into(parts, out, overwrite=overwrite), as_json)
        return 0
    if kind == "compare":
        from ..sharing.study_units import gather_study
        from .compare import say_comparison

        study, comparison = gather_study(
            parts, out, overwrite=overwrite, trust_remote_code=trust_remote_code
        )
        return say_comparison(comparison, study, as_json)
    found, is_kept = gather_eval_into(parts, out, store=open_store(), overwrite=overwrite)
    names = eval_names(found.model.name, found.plan)
    written = out / EVAL_FILE
    say_eval(
        found.values, found.model.dtype, found.plan, names=names, written=written, as_json=as_json
    )
    if not is_kept:
        warn(
            "eval will not find this in the cache: the model or the texts are not here as the "
            "shards say, or different machines measured them"
        )
    return 0
