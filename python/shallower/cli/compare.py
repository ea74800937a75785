"""``shallower compare``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..models.source import ModelSource
from .options import (
    BatchSize,
    DeviceMap,
    DeviceMemory,
    DryRun,
    Dtype,
    Json,
    MaxLength,
    NoCache,
    On,
    Overwrite,
    ShardOption,
    Sizes,
    Stream,
    TrustRemoteCode,
    Workers,
    part_of,
    places,
    read_texts,
)
from .output import called, print_json, say_dry_run_of, say_known, show

if TYPE_CHECKING:
    from ..runs.compare import CompareStudy
    from ..values.comparison import CriteriaComparison
    from ..values.shard import Shard

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL", help="Local folders, hub ids, or .gguf files, compared in this order."
    ),
]
CalibrationTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--texts",
        metavar="TEXTS",
        help="Calibration texts, as for scan; a part of them fits, a part chooses. Given more than "
        "once, each chooses for itself.",
    ),
]
EvalTexts = Annotated[
    str | None,
    typer.Option(
        metavar="TEXTS", help="Held-out texts for every loss that is reported, as --texts."
    ),
]
Criteria = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Criteria, comma-separated; all by default (see --list)."),
]
Judge = Annotated[
    Literal["loss", "kl", "options", "speech"],
    typer.Option(
        help="Judge of a cut. loss: of the next token. kl: divergence from the whole model's "
        "next-token distributions. options: the right option's margin over the others. speech: "
        "divergence from the whole model on its own words."
    ),
]
Options = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON lines with context, options and answer (an index), for --judge "
        "options; one half for the selection, the other for the report.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON lines with prompt or messages, of the judge speech; one half chooses, the other "
        "half reports. Without it prompts of our own.",
    ),
]


def compare_command(
    models: Models = None,
    *,
    texts: CalibrationTexts = None,
    eval_texts: EvalTexts = None,
    sizes: Sizes = "1,2,4,8",
    criteria: Criteria = None,
    unit: Annotated[
        Literal["layers", "experts"],
        typer.Option(
            help="What goes: layers, or experts, --n of each layer that has any, by criteria of "
            "experts, beside the block of layers whose share of the parameters is nearest."
        ),
    ] = "layers",
    judge: Judge = "loss",
    options: Options = None,
    prompts: Prompts = None,
    speech: Annotated[
        bool,
        typer.Option(
            "--speech",
            help="Also how the bare cuts speak, on the half of the prompts that reports; beside "
            "another judge on --prompts, or 24 of our own.",
        ),
    ] = False,
    device_memory: DeviceMemory = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the table, as JSON and CSV, and figures."),
    ] = None,
    dtype: Dtype = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = "auto",
    max_texts: Annotated[
        int, typer.Option(metavar="N", help="Read the first N calibration texts only.", min=1)
    ] = 80,
    max_eval_texts: Annotated[
        int, typer.Option(metavar="N", help="Read the first N held-out texts only.", min=1)
    ] = 64,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of whatever is drawn.", min=0)] = 0,
    device_map: DeviceMap = None,
    stream: Stream = False,
    trust_remote_code: TrustRemoteCode = False,
    no_cache: NoCache = False,
    overwrite: Overwrite = False,
    shard: ShardOption = None,
    on: On = None,
    workers: Workers = None,
    list_criteria: Annotated[
        bool, typer.Option("--list", help="List the criteria of --unit with their cost, and stop.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> int:
    """Compare criteria by what they remove and what that costs.

    Every loss is measured on --eval-texts, which no criterion sees. The exit status is 1 if one
    of several models could not be compared.
    """
    if list_criteria:
        return _list(as_json, of_experts=unit == "experts")
    from ..runs.compare import CompareStudy
    from ..runs.store import open_store
    from ..values.layers import parse_sizes
    from ..values.settings import CompareSettings
    from ..values.tokens import parse_batch_size

    settings = CompareSettings(
        n=parse_sizes(sizes),
        criteria=_names(criteria),
        unit=unit,
        judge=judge,
        options=options,
        prompts=prompts,
        speech=speech,
        max_length=max_length,
        batch_size=parse_batch_size(batch_size),
        max_texts=max_texts,
        max_eval_texts=max_eval_texts,
        seed=seed,
        device_memory=device_memory,
    )
    named, held_out = _read(texts, eval_texts)
    place, part = places(device_map, stream=stream), part_of(shard, on, workers)
    study = CompareStudy(
        models=[
            ModelSource(model, dtype, place, trust_remote_code=trust_remote_code)
            for model in models or ()
        ],
        texts=named,
        eval_texts=held_out,
        settings=settings,
        out=out,
        overwrite=overwrite,
        store=open_store(no_cache, dry_run=dry_run),
        command=called(),
    )
    if dry_run:
        say_dry_run_of(study, _described(study), as_json)
        return 0
    if "shard" in part:
        _say_shard(_measure_shard(study, part["shard"]), as_json)
        return 0
    if part:
        from ..runs.study_units import share

        share(study, **part)
    comparison = study.run()
    if part:
        study.found.clear()  # the workers' results are of today
    return say_comparison(comparison, study, as_json)


def _measure_shard(study: "CompareStudy", shard: "Shard") -> dict[str, Any]:
    from ..errors import ProcessesError
    from ..runs.study_units import measure_shard

    if study.out is None:
        raise ProcessesError("a shard is a file in a folder: name --out")
    return measure_shard(study, shard)


def _say_shard(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    parts = f"{len(done['parts'])} of {done['num_parts']} parts"
    show(f"shard {done['shard']}: {parts}", f"wrote {done['written'][0]}")


def _read(texts: list[str] | None, eval_texts: str | None) -> tuple[dict[str, Any], Any]:
    """Open all texts; those of calibration by the names of their files."""
    from ..errors import TextsError

    if not texts or eval_texts is None:
        missing = "--eval-texts" if texts else "--texts"
        raise TextsError(
            f"{missing} is missing: calibration texts (--texts) and a test set (--eval-texts)"
        )
    places = [Path(source).resolve() if Path(source).exists() else source for source in texts]
    if len(set(places)) < len(places):
        raise TextsError(f"calibration texts are named twice: {', '.join(texts)} (--texts)")
    stems = [_shown(Path(source).stem) for source in texts]
    named = {}
    for source, stem in zip(texts, stems, strict=True):
        name = stem if stems.count(stem) == 1 else _shown(source)
        named[name] = read_texts(source)
    return named, read_texts(eval_texts)


def _shown(name: str) -> str:
    """A name that can be printed; file names can hold bytes of no encoding."""
    return name.encode("utf-8", "replace").decode()


def _names(criteria: str | None) -> list[str] | None:
    return None if criteria is None else [name.strip() for name in criteria.split(",")]


def _described(study: "CompareStudy") -> dict[str, Any]:
    names = study.settings.criteria
    return {
        "compare": ", ".join(map(str, study.models)),
        "texts": ", ".join(study.splits),
        "n": list(study.settings.n),
        "criteria": "all" if names is None else ",".join(map(str, names)),
        "judge": study.settings.judge,
    }


def say_comparison(comparison: "CriteriaComparison", study: "CompareStudy", as_json: bool) -> int:
    """Print a comparison, and write its page; the exit status."""
    from ..reporting.stories.comparison import comparison_story
    from ..runs.report import save_report

    page, story = None, None
    if study.out is not None:
        page, story = save_report(study.out)
    if study.entry is not None:
        say_known(study.entry.made)
    elif study.found:
        what = f"{len(study.found)} results of this comparison: "
        say_known(max(study.found), what=what)
    if as_json:
        print_json({**comparison.to_json(), **study.read})
    else:
        show(story or comparison_story(comparison, drawn=False))
        show(*() if page is None else (f"wrote {study.out}", f"page: {page}"))
    return 1 if comparison.failures else 0


def _list(as_json: bool, *, of_experts: bool) -> int:
    from ..judgement.criteria import criteria, expert_criteria

    rows = [
        {"name": criterion.name, "summary": criterion.summary, "cost": criterion.cost}
        for criterion in (expert_criteria if of_experts else criteria).values()
    ]
    if as_json:
        print_json(rows)
        return 0
    from ..reporting.stories.comparison import criteria_table

    show(criteria_table(rows))
    return 0
