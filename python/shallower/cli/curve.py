"""``shallower curve``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.source import ModelSource
from .options import (
    BatchSize,
    DeviceMap,
    DryRun,
    Dtype,
    GgufFile,
    Json,
    MaxLength,
    Model,
    NoCache,
    On,
    Out,
    OverwriteParts,
    Stream,
    TextsSource,
    Threads,
    TrustRemoteCode,
    Workers,
    part_of,
    places,
    read_texts,
)
from .output import called, print_json, say_dry_run_of, say_known, show

if TYPE_CHECKING:
    from ..runs.curve import CurveStudy
    from ..values.curve import Curve


def curve_command(
    model: Model,
    *,
    texts: TextsSource,
    eval_texts: Annotated[str, typer.Option(metavar="TEXTS", help="The test set, as --texts.")],
    out: Out,
    n: Annotated[
        str,
        typer.Option(
            "--n", metavar="SIZES", help="Layers that go; 0, the whole model, is always measured."
        ),
    ] = "0,1,2,4,8",
    strategies: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Strategies, comma-separated: recommended, similarity, best_plan, deepest, or any "
            "criterion (shallower compare --list).",
        ),
    ] = "recommended,similarity,deepest",
    states: Annotated[
        str,
        typer.Option(metavar="NAMES", help="States: cut, patched, healed; comma-separated."),
    ] = "cut,patched",
    quick_patch: Annotated[
        bool,
        typer.Option("--quick-patch", help="Patch by one matrix a block, in seconds."),
    ] = False,
    patch_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens that a full patch is fitted on.", min=1)
    ] = 16_384,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Tasks beside the loss, comma-separated.")
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Further definitions of tasks.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Data of task files; $SHALLOWER_DATA by default."),
    ] = None,
    max_items: Annotated[
        int | None, typer.Option(metavar="N", help="Items of a task at most.", min=1)
    ] = None,
    num_shots: Annotated[
        int | None, typer.Option(metavar="N", help="Solved examples before each item.", min=0)
    ] = None,
    pass_at: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Also sample K answers where text is asked for: pass@K.", min=1
        ),
    ] = None,
    speech: Annotated[
        str | None,
        typer.Option(
            metavar="[PROMPTS]",
            help="Also how it speaks beside the whole model, on prompts: a .jsonl file with prompt "
            "or messages; without one 24 of our own.",
        ),
    ] = None,
    heal_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Steps of each healing, 16 sequences each; 5,000 by default.", min=1
        ),
    ] = None,
    top: Annotated[
        int,
        typer.Option(metavar="K", help="Proposals of every criterion, for recommended.", min=1),
    ] = 4,
    dtype: Dtype = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = "auto",
    max_texts: Annotated[
        int, typer.Option(metavar="N", help="Read the first N calibration texts only.", min=1)
    ] = 1024,
    max_eval_texts: Annotated[
        int, typer.Option(metavar="N", help="Read the first N held-out texts only.", min=1)
    ] = 256,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of whatever is drawn.", min=0)] = 0,
    device_map: DeviceMap = None,
    stream: Stream = False,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: OverwriteParts = False,
    no_cache: NoCache = False,
    on: On = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure what a model loses as more and more of its layers go.

    The model is loaded once, and cut, patched and healed for each size and strategy. OUT holds
    curve.json, written before each next step, and curve.csv. A curve that was cut short resumes.
    """
    from ..runs.curve import CurveStudy
    from ..runs.store import open_store
    from ..values.layers import parse_sizes
    from ..values.settings import CurveSettings
    from ..values.tokens import parse_batch_size

    settings = CurveSettings(
        n=parse_sizes(n, least=0),
        strategies=_names(strategies),
        states=_names(states),
        quick_patch=quick_patch,
        patch_tokens=patch_tokens,
        tasks=_names(tasks),
        tasks_dir=tasks_dir,
        data=data,
        max_items=max_items,
        num_shots=num_shots,
        pass_at=pass_at,
        heal_steps=heal_steps,
        prompts=() if speech is None else speech or None,
        top=top,
        max_length=max_length,
        batch_size=parse_batch_size(batch_size),
        max_texts=max_texts,
        max_eval_texts=max_eval_texts,
        threads=threads,
        seed=seed,
    )
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
    if dry_run:
        study.check()
        say_dry_run_of(study, _described(study), as_json)
        return
    if part := part_of(None, on, workers):
        from ..runs.study_units import share

        share(study, **part)
    _say(study.run(), study, as_json)


def _names(listed: str | None) -> Any:
    """Names, comma-separated; the settings check them."""
    return () if listed is None else tuple(name.strip() for name in listed.split(","))


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


def _say(curve: "Curve", study: "CurveStudy", as_json: bool) -> None:
    from ..runs.report import save_report

    page, story = save_report(study.folder)
    if study.entry is not None:
        say_known(study.entry.made)
    if as_json:
        print_json({**curve.to_json(), **study.read, "out": str(study.out), "page": str(page)})
        return
    show(story, f"wrote {study.out}", f"page: {page}")
