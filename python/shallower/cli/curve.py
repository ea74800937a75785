"""``shallower curve``. Its options are the fields of ``values/settings.py``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..values.settings import CurveSettings
from .options import Out, Share, Source, TextsSource, WayOfParts, read_texts, takes
from .output import called, carry_out, print_json, say_dry_run_of, say_known, show

if TYPE_CHECKING:
    from ..studies.curve import CurveStudy
    from ..values.curve import Curve


@takes(CurveSettings)
def curve_command(
    *,
    texts: TextsSource,
    eval_texts: Annotated[str, typer.Option(metavar="TEXTS", help="The test set, as --texts.")],
    out: Out,
    settings: CurveSettings,
    source: Source,
    part: Share,
    way: WayOfParts,
) -> None:
    """Measure what a model loses as more and more of its layers go.

    The model is loaded once, and cut, patched and healed for each size and strategy. OUT holds
    curve.json, written before each next step, and curve.csv. A curve that was cut short resumes.
    """
    from ..studies.curve import CurveStudy

    study = CurveStudy(
        models=(source.read(),),
        texts=read_texts(texts),
        eval_texts=read_texts(eval_texts),
        settings=settings,
        out=out,
        overwrite=way.overwrite,
        store=way.open_store(),
        command=called(),
    )
    shared = part.read()
    if way.dry_run:
        study.check()
        say_dry_run_of(study, _described(study), way.as_json)
    elif (curve := carry_out(study, shared, way.as_json)) is not None:
        say_curve(curve, study, way.as_json)


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
