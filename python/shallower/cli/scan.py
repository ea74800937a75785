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
from .output import make_shard_of, say_dry_run, say_known, say_scan

if TYPE_CHECKING:
    from ..sharing.scan_work import ScanWork
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
    from ..studies.scan import ScanJob

    part = part_of(shard, on, workers)
    job = ScanJob(
        source=ModelSource(
            model, dtype, places(device_map, stream=stream), gguf_file, trust_remote_code
        ),
        texts=read_texts(texts, max_texts),
        out=out,
        overwrite=overwrite,
        device_memory=device_memory,
        store=open_store(no_cache, dry_run=dry_run),
        shard=part.get("shard"),
        **vars(settings),
    )
    work = _shared(job, part) if part else None
    if dry_run:
        say_dry_run((work or job).describe(), as_json)
    elif work is not None and work.shard is not None:
        make_shard_of(work, as_json)
    else:
        _carry_out(job, work, as_json)
    if job.known is not None:
        say_known(job.known.made, job.out)


def _shared(job: "ScanJob", part: dict[str, Any]) -> "ScanWork":
    from ..sharing.scan_work import ScanWork

    return ScanWork(job, **part)


def _carry_out(job: "ScanJob", work: "ScanWork | None", as_json: bool) -> None:
    if job.known is not None:
        say_scan(*job.reuse(), as_json)
    elif work is not None:
        from ..sharing.share import share

        scanned, written = share(work)
        say_scan(scanned, written, as_json)
    else:
        loaded = job.load()
        say_scan(*job.run(*loaded), as_json, reading=job.reading(loaded[0]))
