"""The command line: the same words as the Python interface.

Heavy things are imported by the command that needs them; ``shallower --help`` loads no
torch. An error that the user can cause ends with exit status 2 and one sentence.
"""

import functools
import json
import os
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from . import __version__
from .artifacts import (
    CHECKPOINT_FOLDER,
    PARTIAL_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    SCAN_FILE,
    Plan,
    blocks_of,
    dropped_layers,
)
from .errors import (
    LayersError,
    ModelError,
    OutputError,
    PlanError,
    ScanError,
    ShallowerError,
)
from .report import comparison_table, plan_table, ranges, scan_table
from .selection import check_size, deepest_block, parse_layers, parse_sizes
from .similarity import Scan, check_metrics
from .storage import check_free
from .texts import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UsageError: Any = typer.BadParameter.__base__
"""The base of what the parser raises, wherever typer keeps it."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find the layers a language model can do without, cut them out, measure the cost. "
    "Layers are counted from 0 and ranges are half-open.",
)

DtypeName = Literal["float32", "bfloat16", "float16", "nf4", "int8"]
Model = Annotated[str, typer.Argument(help="A local folder, a hub id, or a .gguf file.")]
TextsSource = Annotated[
    str,
    typer.Option(
        help="A .jsonl file (field text), a .txt file (a document a line), a .parquet file, or a "
        "hub dataset as id:split or id:config:split."
    ),
]
Out = Annotated[Path, typer.Option(help="The folder to write to.")]
CutOut = Annotated[
    Path, typer.Option(help="The folder to write to, or a .gguf file if MODEL is one.")
]
Dtype = Annotated[DtypeName, typer.Option(help="Of the weights; nf4 and int8 by bitsandbytes.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="As transformers takes it; auto by default if there is CUDA.")
]
GgufFile = Annotated[str | None, typer.Option(help="A GGUF file in MODEL's folder or repository.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run MODEL's own code.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of a text at most.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Texts in one forward.", min=1)]
Samples = Annotated[int | None, typer.Option(help="Use the first so many texts.", min=1)]
Threads = Annotated[int | None, typer.Option(help="Threads of the core; all by default.", min=1)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, for machines.")]
Drop = Annotated[
    str | None, typer.Option(help="Layers to drop: indices and half-open ranges, as 3,12:20.")
]
PlanPath = Annotated[Path | None, typer.Option("--plan", help="A plan file, or its folder.")]
Sizes = Annotated[str, typer.Option("--n", help="Block sizes to try, as 1,2,4,8.")]


@app.command(
    "scan",
    epilog="Example: shallower scan HuggingFaceTB/SmolLM2-135M --texts c4.jsonl --out scans/smol",
)
def scan_command(
    model: Model,
    texts: TextsSource,
    out: Out,
    dtype: Dtype = "bfloat16",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    samples: Samples = None,
    metrics: Annotated[str, typer.Option(help="Comma-separated.")] = "angular,cosine",
    threads: Threads = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare all layers at the last token of every text, in one pass.

    Writes scan.safetensors and, where matplotlib is installed, heat_map.png. An interrupted
    scan goes on where it was when the same command is given again.
    """
    from .models.loading import count_layers
    from .pipeline import scan

    source = Texts(texts, samples)
    check_free(out / SCAN_FILE, overwrite)
    names = check_metrics([name.strip() for name in metrics.split(",")])
    count_layers(model, gguf_file, trust_remote_code)
    if dry_run:
        _say_dry_run({"scan": model, "texts": texts, "write": [str(out / SCAN_FILE)]}, as_json)
        return
    loaded, tokenizer = _load(model, dtype, device_map, gguf_file, trust_remote_code)
    partial = out / PARTIAL_FILE
    go_on = functools.partial(
        scan,
        loaded,
        tokenizer,
        source,
        max_length,
        batch_size,
        metrics=names,
        threads=threads,
        checkpoint=partial,
        total=source.count(),
    )
    try:
        scanned = go_on()
    except ScanError:
        if not overwrite:
            raise
        partial.unlink()
        scanned = go_on()
    scanned.save(out / SCAN_FILE)
    written = [out / SCAN_FILE, *_draw(scanned, out)]
    partial.unlink(missing_ok=True)
    if as_json:
        _print_json({**_described(scanned), "written": [str(path) for path in written]})
    else:
        _print(scan_table(scanned), *_rejected(scanned), *(f"wrote {path}" for path in written))


@app.command("plan", epilog="Example: shallower plan scans/smol --n 8 --out plans/smol-8")
def plan_command(
    scans: Annotated[
        list[Path], typer.Argument(help="Scan files or their folders; several are merged.")
    ],
    n: Annotated[int, typer.Option("--n", help="Layers to drop.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write the plan to.")] = None,
    strategy: Annotated[
        Literal["similarity", "deepest"],
        typer.Option(help="The most similar block, or the deepest n layers but the last."),
    ] = "similarity",
    metric: Annotated[str | None, typer.Option(help="angular or cosine.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Choose the layers to drop from a scan."""
    scanned = _merged(scans)
    if strategy == "similarity":
        plan = scanned.plan(n, metric)
    else:
        block = deepest_block(scanned.num_layers, n)
        plan = Plan(scanned.num_layers, (block,), "deepest", model=scanned.model)
    written = []
    if out is not None:
        check_free(out / PLAN_FILE, overwrite)
        if not dry_run:
            plan.save(out / PLAN_FILE)
        written.append(f"{'would write' if dry_run else 'wrote'} {out / PLAN_FILE}")
    if as_json:
        _print_json(plan.to_json())
    else:
        _print(plan_table(plan), *written)


@app.command(
    "prune", epilog="Example: shallower prune HuggingFaceTB/SmolLM2-135M --drop 12:20 --out cut"
)
def prune_command(
    model: Model,
    out: CutOut,
    drop: Drop = None,
    plan: PlanPath = None,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Of the weights; by default as stored in a folder, else bfloat16."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Bytes in a file of weights at most, 5GB by default; without --dtype."),
    ] = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Reload with stock transformers and compare the logits."),
    ] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Drop layers, and save a standard checkpoint with the plan beside it.

    A folder of safetensors is cut on disk, without loading it, unless --dtype asks for
    another dtype than the stored one; when interrupted, the same command goes on.
    With an --out that ends in .gguf, a GGUF file is cut directly, without loading it.
    """
    if out.suffix == ".gguf":
        path = _gguf_source(model, gguf_file)
        _refuse_options(
            {
                f"--dtype {dtype}": dtype is not None,
                "--max-shard-size": max_shard_size is not None,
                "--device-map": device_map is not None,
                "--trust-remote-code": trust_remote_code,
                "--verify": verify,
            }
        )
        _prune_gguf(path, out, drop, plan, overwrite, dry_run, as_json)
        return
    on_disk = _is_cut_on_disk(model, dtype, gguf_file)
    if on_disk:
        from .checkpoint import count_stored_layers

        total = count_stored_layers(model, trust_remote_code)
    else:
        from .models.loading import count_layers

        total = count_layers(model, gguf_file, trust_remote_code)
    wanted = _wanted(model, drop, plan, total)
    check_free(out, overwrite)
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise OutputError(f"{out} is the model itself: name another folder for the cut")
    described = {"drop": ranges(wanted.dropped), "keep": ranges(wanted.survivors)}
    dry = {"prune": model, **described, "write": [str(out)]}
    loaded = None
    if on_disk:
        from .checkpoint import prepare

        size = max_shard_size or "5GB"
        cut = prepare(model, wanted.blocks, size, wanted, trust_remote_code)
        if dry_run:
            _say_dry_run({**dry, "bytes": cut.num_bytes}, as_json)
            return
        wanted = cut.plan
        cut.write(out, overwrite)
        dtype = _plain_dtype(model)
    elif max_shard_size is not None:
        raise OutputError(
            "--max-shard-size goes with a folder of safetensors that is cut as it is stored: leave "
            "it out, or leave out --dtype"
        )
    elif dry_run:
        _say_dry_run(dry, as_json)
        return
    else:
        dtype = dtype or "bfloat16"
        loaded = _load(model, dtype, device_map, gguf_file, trust_remote_code)
        wanted = _prune_in_memory(*loaded, out, wanted, overwrite)
    difference = None
    if verify:
        from .pipeline import verify_checkpoint

        loaded = loaded or _load(model, dtype, device_map, gguf_file, trust_remote_code)
        text = "The quick brown fox jumps over the lazy dog, and then it does so again."
        difference = verify_checkpoint(*loaded, out, wanted.blocks, text)
    if as_json:
        _print_json({**wanted.to_json(), "max_logits_difference": difference, "written": str(out)})
    else:
        checked = [] if difference is None else [f"logits differ by at most {difference:.2g}"]
        _print(plan_table(wanted), *checked, f"wrote {out}")


def _is_cut_on_disk(model: str, dtype: DtypeName | None, gguf_file: str | None) -> bool:
    from .checkpoint import is_checkpoint, stored_dtype

    if gguf_file is not None or not is_checkpoint(model):
        return False
    return dtype is None or dtype == stored_dtype(model)


def _plain_dtype(model: str) -> DtypeName:
    """What a folder's weights are loaded in as they are stored."""
    from .checkpoint import stored_dtype

    stored = stored_dtype(model)
    plain: tuple[DtypeName, ...] = ("float32", "float16")
    return next((dtype for dtype in plain if dtype == stored), "bfloat16")


def _prune_in_memory(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    plan: Plan,
    overwrite: bool,
) -> Plan:
    from .models.identity import identify
    from .pruning import save_model, without_layers

    identity = identify(model)
    plan.check_model(identity)
    if plan.model is None:
        plan = replace(plan, model=identity)
    with without_layers(model, plan.blocks):
        save_model(model, tokenizer, out, plan, overwrite)
    return plan


def _gguf_source(model: str, gguf_file: str | None) -> Path:
    """The GGUF file to cut directly."""
    path = Path(model).expanduser() / gguf_file if gguf_file else Path(model).expanduser()
    if path.suffix != ".gguf":
        raise ModelError(
            f"{model} is no .gguf file, and only such a one is cut into a .gguf file: name a "
            f"local file, or a folder as --out"
        )
    return path


def _refuse_options(given: dict[str, bool]) -> None:
    """Refuse options that mean nothing where no model is loaded."""
    for name in (name for name, is_given in given.items() if is_given):
        raise ModelError(
            f"{name} does not go with a .gguf file as --out, which is cut without being loaded: "
            f"leave it out, or name a folder as --out"
        )


def _prune_gguf(
    source: Path,
    out: Path,
    drop: str | None,
    plan: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from .gguf import count_gguf_layers, plan_gguf, plan_path, prune_gguf
    from .progress import track

    wanted = _wanted(str(source), drop, plan, count_gguf_layers(source))
    written = [str(out), str(plan_path(out))]
    if dry_run:
        plan_gguf(source, wanted.blocks, wanted)
        for path in written:
            check_free(Path(path), overwrite)
        described = {"drop": ranges(wanted.dropped), "keep": ranges(wanted.survivors)}
        _say_dry_run({"prune": str(source), **described, "write": written}, as_json)
        return
    with track("cutting, %", 100) as advance:
        percent = 0

        def progress(done: int, total: int) -> None:
            nonlocal percent
            advance(done * 100 // total - percent)
            percent = done * 100 // total

        prune_gguf(source, wanted.blocks, out, overwrite, wanted, progress)
    if as_json:
        _print_json({**wanted.to_json(), "written": written})
    else:
        _print(plan_table(wanted), *(f"wrote {path}" for path in written))


@app.command(
    "eval",
    epilog="Example: shallower eval HuggingFaceTB/SmolLM2-135M --texts c4_eval.jsonl --drop 12:20",
)
def eval_command(
    model: Model,
    texts: TextsSource,
    drop: Drop = None,
    plan: PlanPath = None,
    dtype: Dtype = "bfloat16",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    samples: Samples = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure the next-token loss, before and after a cut if one is named."""
    from .evaluation import evaluate_loss
    from .models.identity import identify
    from .models.loading import count_layers
    from .pruning import without_layers

    held_out = list(Texts(texts, samples))
    wanted = None
    if drop is not None or plan is not None:
        total = count_layers(model, gguf_file, trust_remote_code)
        wanted = _wanted(model, drop, plan, total)
    loaded, tokenizer = _load(model, dtype, device_map, gguf_file, trust_remote_code)
    options: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size}
    if wanted:
        wanted.check_model(identify(loaded))
    losses = {"base": evaluate_loss(loaded, tokenizer, held_out, **options)}
    if wanted:
        with without_layers(loaded, wanted.blocks):
            options["description"] = f"loss without {ranges(wanted.dropped)}"
            losses["cut"] = evaluate_loss(loaded, tokenizer, held_out, **options)
    if as_json:
        described: dict[str, Any] = {name: loss.to_json() for name, loss in losses.items()}
        if wanted:
            described["drop"] = [block.to_json() for block in wanted.blocks]
        _print_json(described)
        return
    for name, loss in losses.items():
        cut = f"without {ranges(wanted.dropped)}" if wanted else ""
        what = cut if name == "cut" else "all layers"
        _print(
            f"{what}: {loss} nats a token ({loss.normalized:.4f} of ln vocabulary), "
            f"{loss.num_tokens} tokens of {loss.num_texts} texts"
            + (f", {loss.num_rejected} texts rejected" if loss.num_rejected else "")
        )


@app.command(
    "run",
    epilog="Example: shallower run HuggingFaceTB/SmolLM2-135M --texts c4.jsonl "
    "--eval-texts c4_eval.jsonl --n 1,2,4,8 --out runs/smol",
)
def run_command(
    model: Model,
    texts: TextsSource,
    eval_texts: Annotated[str, typer.Option(help="Held-out texts for the loss, as --texts.")],
    out: Out,
    sizes: Sizes = "1,2,4,8",
    dtype: Dtype = "bfloat16",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    samples: Samples = None,
    threads: Threads = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """From a model to a shallower one: scan, measure every block size, save the largest cut."""
    from .models.loading import count_layers

    source, held_out = Texts(texts, samples), Texts(eval_texts)
    wanted = parse_sizes(sizes)
    _check_run(out, overwrite)
    num_layers = count_layers(model, gguf_file, trust_remote_code)
    for n in wanted:
        check_size(num_layers, n)
    if dry_run:
        plan = {"run": model, "texts": texts, "eval_texts": eval_texts, "n": wanted}
        _say_dry_run({**plan, "write": [str(out)]}, as_json)
        return
    loaded, tokenizer = _load(model, dtype, device_map, gguf_file, trust_remote_code)
    _run(
        loaded, tokenizer, source, list(held_out), out, wanted, as_json,
        max_length=max_length, batch_size=batch_size, threads=threads, overwrite=overwrite,
        total=source.count(),
    )  # fmt: skip


@app.command("demo", epilog="Example: shallower demo --out shallower-demo")
def demo_command(
    out: Out = Path("shallower-demo"),
    texts: Annotated[
        str | None, typer.Option(help="Texts to use instead of Python's own documentation.")
    ] = None,
    sizes: Sizes = "1,2,4,8",
    dtype: Dtype = "float32",
    samples: Annotated[int, typer.Option(help="Calibration passages.", min=1)] = 128,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """The whole way on SmolLM2-135M-Instruct, with no hub and no download."""
    from . import demo

    path = demo.model_path()
    calibration, held_out = demo.texts(texts, samples, 24)
    wanted = parse_sizes(sizes)
    _check_run(out, overwrite)
    if dry_run:
        counts = {"texts": len(calibration), "eval_texts": len(held_out), "n": wanted}
        _say_dry_run({"demo": path.name, **counts, "write": [str(out)]}, as_json)
        return
    loaded, tokenizer = _load(str(path), dtype, None, None, False)
    _run(loaded, tokenizer, calibration, held_out, out, wanted, as_json, overwrite=overwrite)


def _check_run(out: Path, overwrite: bool) -> None:
    for name in (RESULTS_FILE, CHECKPOINT_FOLDER):
        check_free(out / name, overwrite)


def _run(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Any,
    eval_texts: list[str],
    out: Path,
    sizes: list[int],
    as_json: bool,
    **options: Any,
) -> None:
    from .pipeline import run

    done = run(model, tokenizer, texts, eval_texts, out, sizes, **options)
    _draw(done.scan, out)
    if as_json:
        _print_json({**done.to_json(), "out": str(out)})
        return
    _print(
        scan_table(done.scan),
        comparison_table(done.comparison),
        plan_table(done.plan),
        f"stock reload: logits differ by at most {done.difference:.2g}",
        f"before: {done.before}",
        f"after:  {done.after}",
        *_rejected(done.scan),
        f"wrote {out}",
    )


def _load(
    model: str,
    dtype: DtypeName,
    device_map: str | None,
    gguf_file: str | None,
    trust_remote_code: bool,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    from .models.loading import load_model

    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    return load_model(model, dtype, device_map, gguf_file, trust_remote_code)


def _wanted(model: str, drop: str | None, plan: Path | None, num_layers: int) -> Plan:
    if (drop is None) == (plan is None):
        raise LayersError("name the layers to drop, either by --drop or by --plan")
    if plan is not None:
        path = plan / PLAN_FILE if plan.is_dir() else plan
        loaded = Plan.load(path)
        if loaded.num_layers != num_layers:
            raise PlanError(
                f"the plan {path} is for {loaded.num_layers} layers, {model} has {num_layers}"
            )
        return loaded
    return Plan(num_layers, blocks_of(dropped_layers(num_layers, parse_layers(drop or ""))))


def _merged(scans: list[Path]) -> Scan:
    loaded = [Scan.load(path / SCAN_FILE if path.is_dir() else path) for path in scans]
    merged = Scan.merge(loaded)
    counted = Counter(texts for scanned in loaded for texts in scanned.texts)
    if counted and max(counted.values()) > 1:
        raise ScanError(
            "two of the scans are of the same texts, which would count twice: name each once"
        )
    return merged


def _draw(scanned: Scan, out: Path) -> list[Path]:
    from .errors import MissingExtraError
    from .figures import save_heat_map

    if "angular" not in scanned.metrics or scanned.num_layers < 2:
        return []
    path = out / "heat_map.png"
    try:
        save_heat_map(scanned, path, scanned.model.name if scanned.model else "")
    except MissingExtraError as error:
        _warn(str(error))
        return []
    return [path]


def _described(scanned: Scan) -> dict[str, Any]:
    blocks = [scanned.best_block(n) for n in range(1, scanned.num_layers)]
    return {
        "num_layers": scanned.num_layers,
        "num_samples": scanned.num_samples,
        "num_rejected": scanned.num_rejected,
        "rejections": [str(rejection) for rejection in scanned.rejections],
        "blocks": [{"n": len(block), **block.to_json()} for block in blocks],
    }


def _rejected(scanned: Scan) -> list[str]:
    return [f"rejected {rejection}" for rejection in scanned.rejections]


def _say_dry_run(described: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json({"dry_run": True, **described})
        return
    for name, value in described.items():
        _print(f"would {name}: {value}" if name == "write" else f"{name}: {value}")


def _print(*parts: Any) -> None:
    console = Console()
    for part in parts:
        if isinstance(part, str):
            print(part)
        else:
            console.print(part)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main() -> None:
    """Run the command line; exit status 2 and one sentence for a user's mistake."""
    warnings.showwarning = lambda message, *_args, **_options: _warn(str(message))
    try:
        raise SystemExit(app(standalone_mode=False) or 0)
    except ShallowerError as error:
        message = " ".join(str(error).split())
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "shallower"
        message = f"{error.format_message()} (see {command} --help)"
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
