"""``shallower scan`` and ``analyse``: layers compared by a model, or by states in a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings.options import Option
from ..settings.stages import ScanSettings
from ..values.files import HEAT_MAP_FILE, SCAN_FILE
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
from .output import make_shard_of, reuse, say_dry_run, say_known, say_scan, work_of

if TYPE_CHECKING:
    from ..sharing.scan_work import ScanWork
    from ..store.done import Output
    from ..store.store import Store
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


def analyse_command(
    *,
    states: Annotated[
        Path,
        typer.Argument(
            metavar="STATES",
            help="A .safetensors or .npy file of hidden states, (samples, L+1, D).",
        ),
    ],
    out: Out,
    tensor: Annotated[
        str | None,
        Option(
            "Tensor in a .safetensors file; hidden_states by default, or else the only one "
            "of three axes.",
            "NAME",
            "measures",
        ),
    ] = None,
    settings: Annotated[ScanSettings, "metrics", "threads", "keep_samples"],
    cka_batch: Annotated[
        int | None,
        Option("Also find linear CKA, from minibatches of N samples, 4 to 1024.", "N", "measures"),
    ] = None,
    way: Way,
) -> None:
    """Compare all layers by hidden states in a file, without a model.

    Memory is constant. Writes scan.safetensors and, where matplotlib is installed,
    heat_map.png, for plan.
    """
    from ..reporting.charts.heat_map import draw_heat_map
    from ..scanning.analyse import analyse_states
    from ..scanning.builder import check_metrics
    from ..scanning.states_file import StatesFile
    from ..storage import check_apart, check_free, claimed

    path = out / SCAN_FILE
    check_apart(path, [states])
    asked: dict[str, Any] = {
        "tensor": tensor,
        "metrics": check_metrics(settings.metrics),
        "keep_samples": settings.keep_samples,
        "cka_batch": cka_batch,
    }
    output = _output_of(way.open_store(), states, out, **asked)
    if reuse(output, lambda _: _say_again(out, way.as_json)):
        return
    for name in (SCAN_FILE, HEAT_MAP_FILE):
        check_free(out / name, way.overwrite)
    if way.dry_run:
        with StatesFile(states, tensor) as file:
            described = {
                "analyse": str(states),
                "samples": file.shape[0],
                "states": file.shape[1],
                "width": file.shape[2],
                "bytes": file.num_bytes,
                "write": [str(path)],
            }
        say_dry_run(described, way.as_json)
        return
    with claimed(path, way.overwrite):
        scanned = analyse_states(states, threads=settings.threads, **asked)
        scanned.save(path)
    written = [path, *draw_heat_map(scanned, out)]
    output.keep({})
    say_scan(scanned, written, way.as_json)


def _output_of(store: "Store", states: Path, out: Path, **settings: Any) -> "Output":
    """The scan of a file, as the store remembers it.

    The file is known by its place and time of change: to hash it would take longer than the scan.
    """
    from ..store.done import Output
    from ..store.inputs import file_inputs, made_by

    def inputs() -> dict[str, Any] | None:
        file = file_inputs(states)
        return None if file is None else {"states": file, **settings, "made_by": made_by()}

    return Output(store, "analyse", out, inputs, names=(SCAN_FILE, HEAT_MAP_FILE))


def _say_again(out: Path, as_json: bool) -> None:
    """Print a scan from its folder."""
    from ..scanning.scan import Scan

    written = [path for path in (out / SCAN_FILE, out / HEAT_MAP_FILE) if path.is_file()]
    say_scan(Scan.load(written[0]), written, as_json)
