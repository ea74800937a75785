"""One way to share: workers do the units of a work, or anybody makes its shards by hand.

A kind of work supplies the methods of :mod:`shallower.sharing.work`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ScanError
from ..progress import say_goes_on, track
from ..scanning.scan import Scan
from ..storage import check_apart, resumable_file, write_file
from ..store.inputs import check_made_by
from ..workers.units import Job, Ledger, drive
from .engines import workers_of
from .eval_work import EvalWork
from .scan_work import ScanWork, scan_of
from .shards import read_shards
from .study_work import SETTINGS, StudyWork
from .work import Opened

OPENER = f"{__name__}:open_work"
"""What a worker opens."""

AnyWork = ScanWork | EvalWork | StudyWork

KINDS: dict[str, Any] = {
    **{one.kind: one for one in (ScanWork, EvalWork)},
    **dict.fromkeys(SETTINGS, StudyWork),
}
"""What is shared, by its command."""


def open_work(described: Mapping[str, Any], folder: Path | None = None, job: Any = None) -> Opened:
    """Open a work that another process described; by hand its ``job``, with a ``folder`` for what
    is begun.

    ProcessesError: packages, models or texts are not those of that process.
    """
    check_made_by(described["expects"]["versions"])
    return KINDS[described["kind"]].opens(described, folder, job)


def share(work: AnyWork) -> Any:
    """Let workers do what is missing of a work, and give what one process gives.

    Units that were done before are not done again. Results have the bits of one process with as
    many threads as a worker. ProcessesError: there are no workers, or shards failed too often; the
    others stay for the same command.
    """
    described = work.described()
    with work.held():
        if not work.is_known:
            work.give_up(_handed_out(work, described))
        return work.finish()


def _handed_out(work: AnyWork, described: Mapping[str, Any]) -> Ledger:
    """Let workers do the units that are not done, and keep each result."""
    job, done, units = work.job, work.done(), work.units
    progress, device_memory = getattr(job, "progress", None), getattr(job, "device_memory", None)
    ledger = Ledger(units, done, exact=work.is_exact)
    if done:
        say_goes_on(f"{len(done)} of {len(units)} {work.unit_names} are done", progress)
    with track(f"{work.kind}, {work.unit_names}", len(units), progress) as advance:
        advance(len(done))

        def accept(unit: str, content: bytes) -> None:
            work.keep(unit, content)
            advance(1, unit)

        if not ledger.is_settled:
            how: Any = {"workers": work.workers, "on": work.on, "memory": work.memory}
            engine = workers_of(Job(OPENER, described), **how, device_memory=device_memory)
            drive(engine, ledger, accept, ready=work.ready)
    return ledger


def make_shard(work: AnyWork) -> Path:
    """Make the shard of a work into its file; one that was interrupted is gone on with.

    OutputError: something else is there.
    """
    assert work.shard is not None
    place = work.place(work.shard)
    check_apart(place, work.reads)
    if work.made(work.shard) is None:
        described = work.described()
        with resumable_file(place, str(described["job"]), work.job.overwrite) as folder:
            made = open_work(described, folder, work.job).shard(work.shard)
            write_file(folder / place.name, made.to_bytes())
    return place


def gathered(
    parts: Iterable[Path], out: Path, *, overwrite: bool = False, trust_remote_code: bool = False
) -> tuple[str, Any]:
    """Put the shards of a work together into a folder; the shards stay.

    Returns the kind of the work, and what its ``gather`` gives. Raises ScanError as
    :func:`shallower.gather`, and OutputError.
    """
    parts = list(parts)
    shards = read_shards(parts)
    work = KINDS[shards[0].kind]
    check_apart(out / work.results, [part for part in parts if not part.is_dir()])
    trusts = {"trust_remote_code": trust_remote_code}
    return shards[0].kind, work.gather(shards, out, overwrite=overwrite, **trusts)


def gather(parts: Iterable[str | Path]) -> Scan:
    """Put the shards of a scan together, to the bytes of the scan that one process makes.

    Args:
        parts: files of shards, as ``shallower scan --shard`` writes them, or folders of such, in
            any order. A shard that is there twice counts once.

    Returns:
        The scan.

    Raises:
        ScanError: shards are missing, damaged, or of different scans: of other models, texts,
            settings or versions.
        StatesError: no sample of all was accepted.
    """
    shards = read_shards(parts)
    if shards[0].kind != ScanWork.kind:
        raise ScanError(
            f"these are shards of the kind {shards[0].kind}, not of a scan: use shallower gather"
        )
    return scan_of(shards)
