"""``shallower run`` and ``shallower demo``: the whole way."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..artifacts import CHECKPOINT_FOLDER, RESULTS_FILE
from ..report import comparison_table, plan_table, scan_table
from ..selection import check_size, parse_sizes
from ..storage import check_free
from ..texts import Texts
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
    Out,
    Overwrite,
    Samples,
    Sizes,
    TextsSource,
    Threads,
    TrustRemoteCode,
    load,
)
from .output import draw, print_json, rejected, say_dry_run, show

HEALED_FOLDER = "healed"
"""The healed model below the folder of a run."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    heal: Annotated[
        int | None,
        typer.Option(help="Patch the largest cut, and train adapters for so many steps.", min=1),
    ] = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """From a model to a shallower one: scan, measure every block size, save the largest cut.

    With --heal the cut is patched and healed as well, into healed/ below --out, on the same
    texts; as by shallower heal OUT/checkpoint --original MODEL --from-patch --merge.
    """
    from ..models.loading import count_layers

    source, held_out = Texts(texts, samples), Texts(eval_texts)
    wanted = parse_sizes(sizes)
    _check_run(out, overwrite)
    if heal is not None:
        check_free(out / HEALED_FOLDER, overwrite)
    num_layers = count_layers(model, gguf_file, trust_remote_code)
    for n in wanted:
        check_size(num_layers, n)
    if dry_run:
        plan = {"run": model, "texts": texts, "eval_texts": eval_texts, "n": wanted}
        say_dry_run({**plan, "write": [str(out)]}, as_json)
        return
    loaded, tokenizer = load(model, dtype, device_map, gguf_file, trust_remote_code)
    _run(
        loaded, tokenizer, source, list(held_out), out, wanted, as_json,
        max_length=max_length, batch_size=batch_size, threads=threads, overwrite=overwrite,
        total=source.count(),
    )  # fmt: skip
    if heal is not None:
        del loaded
        _heal(out, model, gguf_file, source, list(held_out), heal, dtype, overwrite,
              trust_remote_code, as_json)  # fmt: skip


def _heal(
    out: Path,
    model: str,
    gguf_file: str | None,
    texts: Texts,
    eval_texts: list[str],
    steps: int,
    dtype: str,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    from ..healing.recipe import Recipe
    from ..healing.run import heal

    uncut = str(Path(model) / gguf_file) if gguf_file else model
    held_in: Any = "bfloat16" if dtype == "float16" else dtype
    done = heal(
        out / CHECKPOINT_FOLDER, texts, out / HEALED_FOLDER, Recipe(steps=steps, dtype=held_in),
        eval_texts, uncut, merge=True, from_patch=True, overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    say_healing(done, out / HEALED_FOLDER, as_json)


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
    from .. import demo

    path = demo.model_path()
    calibration, held_out = demo.texts(texts, samples, 24)
    wanted = parse_sizes(sizes)
    _check_run(out, overwrite)
    if dry_run:
        counts = {"texts": len(calibration), "eval_texts": len(held_out), "n": wanted}
        say_dry_run({"demo": path.name, **counts, "write": [str(out)]}, as_json)
        return
    loaded, tokenizer = load(str(path), dtype, None, None, False)
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
    from ..pipeline import run

    done = run(model, tokenizer, texts, eval_texts, out, sizes, **options)
    draw(done.scan, out)
    if as_json:
        print_json({**done.to_json(), "out": str(out)})
        return
    show(
        scan_table(done.scan),
        comparison_table(done.comparison),
        plan_table(done.plan),
        f"stock reload: logits differ by at most {done.difference:.2g}",
        f"before: {done.before}",
        f"after:  {done.after}",
        *rejected(done.scan),
        f"wrote {out}",
    )
