"""``shallower scan``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.source import ModelSource
from .options import (
    BatchSize,
    DeviceMap,
    DeviceMemory,
    DryRun,
    Dtype,
    GgufFile,
    Json,
    KeepSamples,
    MaxLength,
    MaxTexts,
    Metrics,
    Model,
    NoCache,
    On,
    Out,
    Overwrite,
    ShardOption,
    Stream,
    TextsSource,
    Threads,
    TrustRemoteCode,
    Workers,
    metric_names,
    part_of,
    places,
    read_texts,
)
from .output import say_dry_run, say_known, say_scan, say_shard

if TYPE_CHECKING:
    from ..scanning.until import Until
    from ..studies.scan import ScanJob


def scan_command(
    model: Model,
    *,
    texts: TextsSource,
    out: Out,
    dtype: Dtype = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = "auto",
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
    experts: Annotated[
        bool,
        typer.Option(
            "--experts",
            help="Also gather statistics of a mixture's routed experts, over all tokens, for plan "
            "--experts; takes the time of the experts twice.",
        ),
    ] = False,
    until: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Stop as soon as the best blocks are, with probability P, such as 0.99, no worse "
            "than the best there are by more than --tolerance.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="DISTANCE", help="Tolerance of --until; 0.005 by default."),
    ] = None,
    n: Annotated[
        str | None,
        typer.Option(metavar="SIZES", help="Block sizes that --until is of; by default 1,2,4,8."),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Bet instead of trusting --until's limit theorem; takes more texts."
        ),
    ] = False,
    device_map: DeviceMap = None,
    stream: Stream = False,
    gguf_file: GgufFile = None,
    device_memory: DeviceMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    no_cache: NoCache = False,
    shard: ShardOption = None,
    on: On = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare all layers of a model on texts, in one pass.

    The last token of every text is compared, or more by --positions. Writes scan.safetensors
    and, if matplotlib is installed, heat_map.png. An interrupted scan resumes when the same
    command is given again.
    """
    from ..store.store import open_store
    from ..values.positions import Positions
    from ..values.tokens import Tokens, parse_batch_size

    part = part_of(shard, on, workers)
    job = _kind(part)(
        source=ModelSource(
            model, dtype, places(device_map, stream=stream), gguf_file, trust_remote_code
        ),
        texts=read_texts(texts, max_texts),
        out=out,
        tokens=Tokens(max_length, parse_batch_size(batch_size)),
        metrics=metric_names(metrics),
        positions=Positions.parse(positions, seed),
        threads=threads,
        keep_samples=keep_samples,
        experts=experts,
        until=_until(until, tolerance, n, exact=exact),
        overwrite=overwrite,
        device_memory=device_memory,
        store=open_store(no_cache or dry_run),
        **part,
    )
    if dry_run:
        say_dry_run(job.describe(), as_json)
    else:
        _carry_out(job, as_json)


def _kind(part: dict[str, Any]) -> "type[ScanJob]":
    """The scan that is asked for: of one process, a shard, or shared by workers."""
    if not part:
        from ..studies.scan import ScanJob

        return ScanJob
    from ..sharing.scan_shards import ShardJob, SharedScanJob

    return ShardJob if "shard" in part else SharedScanJob


def _carry_out(job: "ScanJob", as_json: bool) -> None:
    from ..sharing.scan_shards import ShardJob, SharedScanJob

    if isinstance(job, ShardJob):
        if job.known is None:
            job.run_shard()
        say_shard(job.file, as_json)
    elif job.known is not None:
        say_scan(*job.reuse(), as_json)
    elif isinstance(job, SharedScanJob):
        say_scan(*job.run_shared(), as_json)
    else:
        loaded = job.load()
        say_scan(*job.run(*loaded), as_json, reading=job.reading(loaded[0]))
    if job.known is not None:
        say_known(job.known.made, job.file if isinstance(job, ShardJob) else job.out)


def _until(
    confidence: float | None, tolerance: float | None, sizes: str | None, *, exact: bool
) -> "Until | None":
    """When to stop; SettingsError for what is set of it where nothing stops the scan."""
    from ..errors import SettingsError
    from ..scanning.until import DEFAULT_TOLERANCE, Until
    from ..values.layers import parse_sizes

    if confidence is None:
        if exact or (tolerance, sizes) != (None, None):
            raise SettingsError(
                "--tolerance, --n and --exact say when a scan stops: add --until 0.99, say"
            )
        return None
    return Until(
        confidence,
        DEFAULT_TOLERANCE if tolerance is None else tolerance,
        () if sizes is None else tuple(parse_sizes(sizes)),
        exact,
    )
