"""``shallower scan``."""

import functools
from typing import Annotated, Any

import typer

from ..artifacts import PARTIAL_FILE, SCAN_FILE
from ..errors import ScanError
from ..positions import Positions
from ..report import scan_table
from ..similarity import Scan, check_metrics
from ..storage import check_free
from ..texts import Texts
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
    TextsSource,
    Threads,
    TrustRemoteCode,
    load,
)
from .output import draw, print_json, rejected, say_dry_run, show


def scan_command(
    model: Model,
    texts: TextsSource,
    out: Out,
    dtype: Dtype = "bfloat16",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    samples: Samples = None,
    metrics: Annotated[
        str, typer.Option(help="Of angular, cosine, relative_l2, norm_ratio; comma-separated.")
    ] = "angular,cosine",
    positions: Annotated[
        str,
        typer.Option(
            help="The tokens of a text to compare: last, last:K, random:K or all. Errors are "
            "clustered by text."
        ),
    ] = "last",
    seed: Annotated[int, typer.Option(help="Of --positions random:K.", min=0)] = 0,
    threads: Threads = None,
    keep_samples: Annotated[
        bool,
        typer.Option(
            "--keep-samples",
            help="Keep the distances of every text for plan --bootstrap: 4 bytes times texts times "
            "pairs of layers, for each metric.",
        ),
    ] = False,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare all layers at the last token of every text, or at more, in one pass.

    Writes scan.safetensors and, where matplotlib is installed, heat_map.png. An interrupted
    scan goes on where it was when the same command is given again.
    """
    from ..models.loading import count_layers
    from ..pipeline import scan

    source = Texts(texts, samples)
    check_free(out / SCAN_FILE, overwrite)
    names = check_metrics([name.strip() for name in metrics.split(",")])
    tokens = Positions.parse(positions, seed)
    count_layers(model, gguf_file, trust_remote_code)
    if dry_run:
        described = {"scan": model, "texts": texts, "positions": str(tokens)}
        say_dry_run({**described, "write": [str(out / SCAN_FILE)]}, as_json)
        return
    loaded, tokenizer = load(model, dtype, device_map, gguf_file, trust_remote_code)
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
        keep_samples=keep_samples,
        positions=tokens,
    )
    try:
        scanned = go_on()
    except ScanError:
        if not overwrite:
            raise
        partial.unlink()
        scanned = go_on()
    scanned.save(out / SCAN_FILE)
    written = [out / SCAN_FILE, *draw(scanned, out)]
    partial.unlink(missing_ok=True)
    if as_json:
        print_json({**_described(scanned), "written": [str(path) for path in written]})
    else:
        show(scan_table(scanned), *rejected(scanned), *(f"wrote {path}" for path in written))


def _described(scanned: Scan) -> dict[str, Any]:
    blocks = [scanned.best_block(n) for n in range(1, scanned.num_layers)]
    return {
        "num_layers": scanned.num_layers,
        "positions": str(scanned.positions),
        "num_samples": scanned.num_samples,
        "num_sequences": scanned.num_sequences,
        "num_rejected": scanned.num_rejected,
        "rejections": [str(rejection) for rejection in scanned.rejections],
        "blocks": [{"n": len(block), **block.to_json()} for block in blocks],
    }
