"""``shallower curve``. Its options are the fields of ``values/settings.py``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.source import ModelSource
from ..values.settings import CurveSettings
from .options import (
    DeviceMap,
    DryRun,
    Dtype,
    GgufFile,
    Json,
    Model,
    NoCache,
    On,
    Out,
    OverwriteParts,
    ShardOption,
    Stream,
    TextsSource,
    TrustRemoteCode,
    Workers,
    part_of,
    places,
    read_texts,
    takes,
)
from .output import called, make_shard_of, print_json, say_dry_run_of, say_known, show

if TYPE_CHECKING:
    from ..studies.curve import CurveStudy
    from ..values.curve import Curve


@takes(CurveSettings)
def curve_command(
    model: Model,
    *,
    texts: TextsSource,
    eval_texts: Annotated[str, typer.Option(metavar="TEXTS", help="The test set, as --texts.")],
    out: Out,
    settings: CurveSettings,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    stream: Stream = False,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: OverwriteParts = False,
    no_cache: NoCache = False,
    shard: ShardOption = None,
    on: On = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure what a model loses as more and more of its layers go.

    The model is loaded once, and cut, patched and healed for each size and strategy. OUT holds
    curve.json, written before each next step, and curve.csv. A curve that was cut short resumes.
    """
    from ..store.store import open_store
    from ..studies.curve import CurveStudy

    study = CurveStudy(
        models=(
            ModelSource(
                model, dtype, places(device_map, stream=stream), gguf_file, trust_remote_code
            ),
        ),
        texts=read_texts(texts),
        eval_texts=read_texts(eval_texts),
        settings=settings,
        out=out,
        overwrite=overwrite,
        store=open_store(no_cache, dry_run=dry_run),
        command=called(),
    )
    part = part_of(shard, on, workers)
    if dry_run:
        study.check()
        say_dry_run_of(study, _described(study), as_json)
    elif part:
        _carry_out(study, part, as_json)
    else:
        say_curve(study.run(), study, as_json)


def _carry_out(study: "CurveStudy", part: dict[str, Any], as_json: bool) -> None:
    """Make a shard, or let workers share the curve."""
    from ..sharing.share import share
    from ..sharing.study_work import CurveWork

    work = CurveWork(study, **part)
    if work.shard is None:
        say_curve(share(work), study, as_json)
    else:
        make_shard_of(work, as_json)


def _described(study: "CurveStudy") -> dict[str, Any]:
    settings = study.settings
    named = {
        "strategies": settings.strategies,
        "states": settings.states,
        "tasks": settings.tasks,
        "speech": [f"{len(study.prompts)} prompts"] if study.prompts else (),
    }
    return {
        "curve": str(study.model),
        "n": [0, *settings.n],
        **{name: ", ".join(names) for name, names in named.items() if names},
    }


def say_curve(curve: "Curve", study: "CurveStudy", as_json: bool) -> None:
    """Print a curve, and write its page."""
    from ..runs.report import save_report

    page, story = save_report(study.folder)
    if study.entry is not None:
        say_known(study.entry.made)
    if as_json:
        print_json({**curve.to_json(), **study.read, "out": str(study.out), "page": str(page)})
        return
    show(story, f"wrote {study.out}", f"page: {page}")
