"""``shallower scan``."""

from typing import TYPE_CHECKING, Any

from ..models.source import ModelSource
from ..values.stage_settings import ScanSettings
from .options import (
    DeviceMap,
    DeviceMemory,
    DryRun,
    Dtype,
    GgufFile,
    Json,
    MaxTexts,
    Model,
    NoCache,
    On,
    Out,
    Overwrite,
    ShardOption,
    Stream,
    TextsSource,
    TrustRemoteCode,
    Workers,
    part_of,
    places,
    read_texts,
    takes,
)
from .output import say_dry_run, say_known, say_scan, say_shard

if TYPE_CHECKING:
    from ..studies.scan import ScanJob


@takes(ScanSettings)
def scan_command(
    model: Model,
    *,
    texts: TextsSource,
    out: Out,
    settings: ScanSettings,
    dtype: Dtype = "auto",
    max_texts: MaxTexts = None,
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

    part = part_of(shard, on, workers)
    job = _kind(part)(
        source=ModelSource(
            model, dtype, places(device_map, stream=stream), gguf_file, trust_remote_code
        ),
        texts=read_texts(texts, max_texts),
        out=out,
        overwrite=overwrite,
        device_memory=device_memory,
        store=open_store(no_cache, dry_run=dry_run),
        **vars(settings),
        **part,
    )
    if dry_run:
        say_dry_run(job.describe(), as_json)
    else:
        _carry_out(job, as_json)
    if job.known is not None:
        say_known(job.known.made, job.file if "shard" in part else job.out)


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
