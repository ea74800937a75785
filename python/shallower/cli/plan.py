"""``shallower plan``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import (
    BatchSize,
    DeviceMap,
    DryRun,
    Dtype,
    GgufFile,
    Json,
    MaxLength,
    MaxTexts,
    NoCache,
    Overwrite,
    TrustRemoteCode,
    quiet,
    read_texts,
)
from .output import print_json, show

if TYPE_CHECKING:
    from ..judgement.choice import Choice
    from ..values.verification import Verified

Scans = Annotated[
    list[Path],
    typer.Argument(metavar="SCAN...", help="Scan files or their folders; several are merged."),
]
Verify = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        help="Let a judge race the K best proposals of several criteria, those of the scan among "
        "them; needs --model and --texts.",
        min=1,
    ),
]
VerifiedModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Model for --verify: a local folder, a hub id, or a .gguf file."
    ),
]
VerifyTexts = Annotated[
    str | None,
    typer.Option(
        metavar="TEXTS",
        help="Texts for --verify, as for scan: up to 32 of them fit, the others choose.",
    ),
]
After = Annotated[
    Literal["none", "patch"] | None,
    typer.Option(
        help="When --verify judges: as layers are cut (none), or after a quick patch (patch, the "
        "default)."
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Metric that decides: angular, cosine or relative_l2; angular by default where "
        "the scan holds it.",
    ),
]
MaxBlocks = Annotated[
    int,
    typer.Option(
        "--max-blocks",
        "--blocks",
        metavar="N",
        help="Blocks at most; a layer stays between two blocks.",
        min=1,
    ),
]
Bootstrap = Annotated[
    int,
    typer.Option(
        metavar="B",
        help="Resample the texts B times, and say in which share of them the block is the "
        "best; for scans made with --keep-samples.",
        min=0,
    ),
]

NEEDS_VERIFY = {
    "model": None, "texts": None, "after": None, "dtype": "auto", "device_map": None,
    "gguf_file": None, "trust_remote_code": False, "max_length": 256, "batch_size": "auto",
    "max_texts": None, "no_cache": False,
}  # fmt: skip
"""Options that belong to ``--verify``, and what they are where they are not given."""

WITHOUT_VERIFY = {
    "strategy": "similarity", "protect_first": 0, "protect_last": 0, "top": 0, "bootstrap": 0,
}  # fmt: skip
"""Options of a choice by the scan alone, likewise."""


def plan_command(
    scans: Scans,
    *,
    n: Annotated[int, typer.Option("--n", metavar="N", help="Number of layers to drop.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write the plan to.")
    ] = None,
    strategy: Annotated[
        Literal["similarity", "deepest"],
        typer.Option(help="The most similar layers, or the deepest but the last."),
    ] = "similarity",
    metric: Metric = None,
    max_blocks: MaxBlocks = 1,
    protect_first: Annotated[
        int, typer.Option(metavar="N", help="Number of layers at the start that stay.", min=0)
    ] = 0,
    protect_last: Annotated[
        int, typer.Option(metavar="N", help="Number of layers at the end that stay.", min=0)
    ] = 0,
    top: Annotated[
        int, typer.Option(metavar="K", help="Also list the K best blocks of --n layers.", min=0)
    ] = 0,
    bootstrap: Bootstrap = 0,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of --bootstrap and --verify.", min=0)
    ] = 0,
    verify: Verify = None,
    model: VerifiedModel = None,
    texts: VerifyTexts = None,
    after: After = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    max_length: MaxLength = 256,
    batch_size: BatchSize = "auto",
    max_texts: MaxTexts = None,
    no_cache: NoCache = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Choose the layers to drop from a scan.

    Writes shallower_plan.json for prune, eval and patch; without --out the plan is shown only.
    With --verify a judge has the last word, on texts.
    """
    given = dict(locals())
    from ..judgement.choice import choose, load_scans
    from ..storage import check_free
    from ..values.files import PLAN_FILE

    check_verify(given)
    if out is not None:
        check_free(out / PLAN_FILE, overwrite)
    scanned = load_scans(scans)
    chosen = choose(
        scanned, n, strategy=strategy, metric=metric, max_blocks=max_blocks,
        protect_first=protect_first, protect_last=protect_last, top=verify or top,
        bootstrap=bootstrap, seed=seed,
    )  # fmt: skip
    verified = None if verify is None or dry_run else _verified(given, chosen)
    plan = chosen.plan if verified is None else verified.plan
    if out is not None and not dry_run:
        plan.save(out / PLAN_FILE)
    if as_json:
        print_json(chosen.to_json() if verified is None else _as_json(verified))
        return
    parts = _choice(chosen, verify) if verified is None else _verification(verified)
    if out is not None:
        parts.append(f"{'would write' if dry_run else 'wrote'} {out / PLAN_FILE}")
    show(*parts)


def check_verify(given: dict[str, Any]) -> None:
    """Refuse options that do not go together, before anything is read.

    Args:
        given: the options by their names.

    Raises:
        LayersError: an option needs ``--verify``, or does not go with it.
    """
    from ..errors import LayersError

    is_verified = given["verify"] is not None
    others = WITHOUT_VERIFY if is_verified else NEEDS_VERIFY
    named = [
        f"--{name.replace('_', '-')}" for name, value in others.items() if given[name] != value
    ]
    if named and is_verified:
        raise LayersError(
            f"{', '.join(named)}: the judge of --verify has the last word, leave out one of both"
        )
    if named:
        raise LayersError(
            f"{', '.join(named)}: only --verify looks at a model and texts, give it or leave "
            f"{'this' if len(named) == 1 else 'these'} out"
        )
    missing = [f"--{name}" for name in ("model", "texts") if given[name] is None]
    if is_verified and missing:
        raise LayersError(
            f"--verify needs a model and texts to judge on: {' and '.join(missing)} missing"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _verified(given: dict[str, Any], chosen: "Choice") -> "Verified":
    """Race what the scan proposes with what other criteria propose."""
    from ..models.source import ModelSource
    from ..runs.cache import open_cache
    from ..runs.verify import MAX_TEXTS, VerificationJob
    from ..values.plan import Plan
    from ..values.tokens import Tokens, parse_batch_size

    layers, n = chosen.plan.num_layers, given["n"]
    more = [chosen.plan, *(Plan.of(layers, [block]) for block in chosen.best)]
    job = VerificationJob(
        model=ModelSource(
            given["model"], given["dtype"], given["device_map"], given["gguf_file"],
            given["trust_remote_code"],
        ),
        texts=read_texts(given["texts"]), sizes=[n], top=given["verify"],
        after=given["after"] or "patch", max_blocks=given["max_blocks"],
        tokens=Tokens(given["max_length"], parse_batch_size(given["batch_size"])),
        max_texts=given["max_texts"] or MAX_TEXTS, seed=given["seed"],
        more={n: more}, cache=open_cache(given["no_cache"]),
    )  # fmt: skip
    quiet()
    return job.run()[n]


def _as_json(verified: "Verified") -> dict[str, Any]:
    return {**verified.to_json(), **verified.plan.to_json()}


def _choice(chosen: "Choice", verify: int | None) -> list[Any]:
    from ..reporting.tables import plan_table, starts_table

    parts: list[Any] = [plan_table(chosen.plan)]
    if chosen.best:
        parts.append(starts_table(chosen.best, chosen.plan.metric, chosen.start))
    if chosen.start:
        parts.append(chosen.sentence())
    return [*parts, "would be verified"] if verify else parts


def _verification(verified: "Verified") -> list[Any]:
    from ..reporting.tables import plan_table
    from ..reporting.verification import candidates_table, failed_proposals

    tables = [plan_table(verified.plan), candidates_table(verified)]
    return [*tables, *failed_proposals(verified), verified.sentence()]
