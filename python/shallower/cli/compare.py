"""``shallower compare`` and ``curve``, whose options are those of the settings; ``report``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import TextsError
from ..settings.options import Option
from ..settings.studies import CompareSettings, CurveSettings
from .config import Config
from .options import Json, Loading, Share, Way, read_texts
from .output import called, carry_out, print_json, say_dry_run_of, say_known, show

if TYPE_CHECKING:
    from ..results.comparison import CriteriaComparison
    from ..studies.compare import CompareStudy


Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL", help="Local folders, hub ids, or .gguf files, compared in this order."
    ),
]


Sources = Annotated[
    list[str] | None,
    Option(
        "Texts for calibration and selection, as for scan. Repeat the option to compare sources.",
        "TEXTS",
    ),
]
TestSet = Annotated[
    str | None, Option("Held-out texts of all reported losses, as --texts.", "TEXTS")
]
Folder = Annotated[
    Path | None, Option("Folder for the table, as JSON and CSV, and a page.", "FOLDER")
]
Loaded = Annotated[Loading, "dtype", "device_map", "stream", "trust_remote_code"]


def compare_command(
    models: Models = None,
    *,
    texts: Sources = None,
    eval_texts: TestSet = None,
    out: Folder = None,
    config: Config = None,
    settings: CompareSettings,
    loading: Loaded,
    part: Share,
    list_criteria: Annotated[
        bool,
        Option(
            "List the criteria of --unit with their cost, and stop.", group="output", name="list"
        ),
    ] = False,
    way: Way,
) -> int:
    """Compare criteria by what they remove and what that costs.

    Every reported number comes from --eval-texts, which no criterion sees. The exit status is 1 if
    one of several models could not be compared.
    """
    if list_criteria:
        return _list(way.as_json, of_experts=settings.unit == "experts")
    from ..studies.compare import CompareStudy

    named, held_out = _read(texts, eval_texts)
    sources, shared = [loading.of(model) for model in models or ()], part.read()
    study = CompareStudy(
        models=sources,
        texts=named,
        eval_texts=held_out,
        settings=settings,
        out=out,
        overwrite=way.overwrite,
        store=way.open_store(),
        command=called(),
    )
    if way.dry_run:
        say_dry_run_of(study, _described(study), way.as_json)
        return 0
    comparison = carry_out(study, shared, way.as_json)
    return 0 if comparison is None else say_comparison(comparison, study, way.as_json)


def curve_command(
    models: Models = None,
    *,
    texts: Sources = None,
    eval_texts: TestSet = None,
    out: Folder = None,
    config: Config = None,
    settings: CurveSettings,
    loading: Loaded,
    part: Share,
    way: Way,
) -> int:
    """Measure what a model loses as more and more of its layers go.

    As shallower compare, with more texts, full patches, and few criteria.
    """
    return compare_command(
        models,
        texts=texts,
        eval_texts=eval_texts,
        out=out,
        settings=settings,
        loading=loading,
        part=part,
        way=way,
    )


def _read(texts: list[str] | None, eval_texts: str | None) -> tuple[dict[str, Any], Any]:
    """Open all texts; those of calibration by the names of their files."""
    if not texts:
        raise TextsError("--texts is missing: name calibration texts (--texts)")
    places = [Path(source).resolve() if Path(source).exists() else source for source in texts]
    if len(set(places)) < len(places):
        raise TextsError(f"calibration texts are named twice: {', '.join(texts)} (--texts)")
    stems = [_shown(Path(source).stem) for source in texts]
    named = {}
    for source, stem in zip(texts, stems, strict=True):
        name = stem if stems.count(stem) == 1 else _shown(source)
        named[name] = read_texts(source)
    return named, None if eval_texts is None else read_texts(eval_texts)


def _shown(name: str) -> str:
    """A name that can be printed; file names can hold bytes of no encoding."""
    return name.encode("utf-8", "replace").decode()


def _described(study: "CompareStudy") -> dict[str, Any]:
    settings = study.settings
    names = settings.criteria
    shown = {
        settings.COMMAND: ", ".join(map(str, study.models)),
        "texts": ", ".join(study.splits),
        "n": list(settings.n),
        "criteria": "all" if names is None else ",".join(map(str, names)),
        "states": ", ".join(settings.states),
        "judge": settings.judge,
        "tasks": ", ".join(settings.tasks),
        "speech": f"{len(study.prompts)} prompts" if study.prompts else "",
    }
    return {name: value for name, value in shown.items() if value}


def say_comparison(comparison: "CriteriaComparison", study: "CompareStudy", as_json: bool) -> int:
    """Print a comparison, and write its page; the exit status."""
    from ..reporting.report import save_report
    from ..reporting.stories.comparison import comparison_story

    page, story = None, None
    if study.out is not None:
        page, story = save_report(study.out)
    if study.entry is not None:
        say_known(study.entry.made)
    elif study.found:
        what = f"{len(study.found)} results of this comparison: "
        say_known(max(study.found), what=what)
    if as_json:
        places = {} if page is None else {"out": str(study.out), "page": str(page)}
        print_json({**comparison.to_json(), **study.read, **places})
    else:
        show(story or comparison_story(comparison, drawn=False))
        show(*() if page is None else (f"wrote {study.out}", f"page: {page}"))
    return 1 if comparison.failures else 0


def _list(as_json: bool, *, of_experts: bool) -> int:
    from ..judgement.criteria import NAMED, criteria, expert_criteria

    rows = [
        {"name": criterion.name, "summary": criterion.summary, "cost": criterion.cost}
        for criterion in (expert_criteria if of_experts else {**criteria, **NAMED}).values()
    ]
    if as_json:
        print_json(rows)
        return 0
    from ..reporting.stories.cuts import criteria_table

    show(criteria_table(rows))
    return 0


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
