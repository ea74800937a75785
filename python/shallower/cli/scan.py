"""``shallower scan``."""

from typing import TYPE_CHECKING

from ..settings.stages import ScanSettings
from .options import (
    DeviceMemory,
    Loading,
    MaxTexts,
    Model,
    Out,
    Share,
    TextsSource,
    Way,
    read_texts,
)
from .output import make_shard_of, say_dry_run, say_known, say_scan, work_of

if TYPE_CHECKING:
    from ..sharing.scan_work import ScanWork
    from ..studies.scan import ScanJob


def scan_command(
    *,
    model: Model,
    texts: TextsSource,
    out: Out,
    settings: ScanSettings,
    max_texts: MaxTexts = None,
    source: Loading,
    device_memory: DeviceMemory = None,
    part: Share,
    way: Way,
) -> None:
    """Compare all layers of a model on texts, in one pass.

    The last token of every text is compared, or more by --positions. Writes scan.safetensors
    and, if matplotlib is installed, heat_map.png. An interrupted scan resumes when the same
    command is given again.
    """
    from ..studies.scan import ScanJob

    shared = part.read()
    job = ScanJob(
        source=source.of(model),
        texts=read_texts(texts, max_texts),
        out=out,
        overwrite=way.overwrite,
        device_memory=device_memory,
        store=way.open_store(),
        shard=shared.get("shard"),
        **vars(settings),
    )
    work: ScanWork | None = work_of("scan", job, shared)
    if way.dry_run:
        say_dry_run((work or job).describe(), way.as_json)
    elif work is not None and work.shard is not None:
        make_shard_of(work, way.as_json)
    else:
        _carry_out(job, work, way.as_json)
    if job.known is not None:
        say_known(job.known.made, job.out)
    elif job.found:
        say_known(job.found[0])


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
