"""``shallower scan``."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from ..models.dtypes import Dtype as DtypeName
from ..models.source import ModelSource
from .options import (
    BatchSize,
    DeviceMap,
    DryRun,
    Dtype,
    GgufFile,
    Json,
    KeepSamples,
    MaxLength,
    MaxTexts,
    Metrics,
    Model,
    Out,
    Overwrite,
    TextsSource,
    Threads,
    TrustRemoteCode,
    load,
    metric_names,
    read_texts,
    resolve,
)
from .output import say_dry_run, say_scan


def scan_command(
    model: Model,
    *,
    texts: TextsSource,
    out: Out,
    dtype: Dtype = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    max_texts: MaxTexts = None,
    metrics: Metrics = "angular,cosine",
    positions: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="Tokens of a text to compare: last, last:K, random:K or all. Errors are "
            "clustered by text.",
        ),
    ] = "last",
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of --positions random:K.", min=0)
    ] = 0,
    threads: Threads = None,
    keep_samples: KeepSamples = False,
    keep_states: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the states to this .safetensors file, for analyse: 2 bytes (4 in float32) "
            "times compared tokens times layers and one times their width; --dry-run counts them.",
        ),
    ] = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare all layers of a model on texts, in one pass.

    The last token of every text is compared, or more by --positions.
    Writes scan.safetensors and, where matplotlib is installed, heat_map.png. An interrupted
    scan, its kept states too, goes on where it was when the same command is given again.
    """
    from ..errors import ScanError
    from ..reporting.figures import draw_heat_map
    from ..scanning.states_writer import check_keepable
    from ..storage import check_free
    from ..values.files import PARTIAL_FILE, SCAN_FILE
    from ..values.positions import Positions

    source = read_texts(texts, max_texts)
    check_free(out / SCAN_FILE, overwrite)
    names = metric_names(metrics)
    tokens = Positions.parse(positions, seed)
    if keep_states is not None:
        _check_apart(check_keepable(keep_states, overwrite=overwrite), out)
    place = resolve(ModelSource(model, dtype, device_map, gguf_file, trust_remote_code))
    shape = place.states_shape()
    if dry_run:
        described: dict[str, Any] = {
            "scan": model, "dtype": place.dtype, "texts": texts, "positions": str(tokens),
        }  # fmt: skip
        if keep_states is not None:
            most = min(max_length, tokens.count or max_length)
            described.update(_room(shape, place.dtype, most, source.count(), keep_states))
        described["write"] = [str(path) for path in (out / SCAN_FILE, keep_states) if path]
        say_dry_run(described, as_json)
        return
    loaded, tokenizer = load(place)
    from ..scanning.model import scan

    partial = out / PARTIAL_FILE
    go_on = functools.partial(
        scan,
        loaded,
        tokenizer,
        source,
        max_length=max_length,
        batch_size=batch_size,
        metrics=names,
        threads=threads,
        checkpoint=partial,
        keep_samples=keep_samples,
        keep_states=keep_states,
        overwrite=overwrite,
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
    written = [out / SCAN_FILE, *draw_heat_map(scanned, out)]
    partial.unlink(missing_ok=True)
    if keep_states is not None:
        written.append(keep_states)
    say_scan(scanned, written, as_json)


def _check_apart(keep_states: Path, out: Path) -> None:
    from ..errors import OutputError
    from ..values.files import PARTIAL_FILE, SCAN_FILE

    for name in (SCAN_FILE, PARTIAL_FILE):
        if keep_states.absolute() == (out / name).absolute():
            raise OutputError(f"{keep_states} is the scan itself: keep the states elsewhere")


def _room(
    shape: tuple[int, int | None],
    dtype: DtypeName,
    tokens: int,
    num_texts: int | None,
    path: Path,
) -> dict[str, int | None]:
    """How many bytes kept states take, and how many are free; None where that is not known.

    ``tokens`` of a text are compared at most.
    """
    from ..storage import free_bytes

    num_states, width = shape
    each = None if width is None else num_states * width * (4 if dtype == "float32" else 2)
    return {
        "states_bytes_per_token": each,
        "states_bytes_at_most": each and num_texts and each * tokens * num_texts,
        "free_bytes": free_bytes(path),
    }
