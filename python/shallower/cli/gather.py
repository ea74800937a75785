"""``shallower gather``: the shards of a work put together."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..values.files import EVAL_FILE
from .options import Json, Out, Overwrite, TrustRemoteCode
from .output import eval_names, say_eval, say_scan, warn

if TYPE_CHECKING:
    from ..studies.evaluate import Results
    from ..values.plan import Plan


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
    """Put the shards of a scan, eval, comparison or curve together.

    All must be there, and of the same work. From a scan it writes scan.safetensors, with the bytes
    that one process would write, and heat_map.png if matplotlib is installed. From an eval it
    writes eval.json, as eval --json prints it, and caches the result. From a comparison or a curve
    it writes all that one process does: the model is loaded for its shape, and of what shards have
    nothing is measured.
    """
    from ..sharing.share import gathered
    from .compare import say_comparison

    trusts = {"trust_remote_code": trust_remote_code}
    kind, found = gathered(parts, out, overwrite=overwrite, **trusts)
    if kind == "scan":
        scanned, written = found
        say_scan(scanned, written, as_json)
        return 0
    if kind == "eval":
        _say_eval(*found, out=out, as_json=as_json)
        return 0
    study, done = found
    return say_comparison(done, study, as_json)


def _say_eval(
    found: "Results", plan: "Plan | None", is_kept: bool, *, out: Path, as_json: bool
) -> None:
    from ..studies.evaluate import values_and_dtype

    values, dtype = values_and_dtype(found)
    one = next(one for sides in found.values() for one in sides.values())
    names = eval_names(one.model.name, plan)
    written = [out / EVAL_FILE]
    say_eval(values, dtype, plan, names=names, written=written, as_json=as_json)
    if not is_kept:
        warn(
            "eval will not find this in the cache: the model or the texts are not here as the "
            "shards say, or different machines measured them"
        )
