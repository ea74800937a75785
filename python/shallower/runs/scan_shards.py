"""Shards of a scan: one by hand, or all of them by workers, into the folder of the scan."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import OutputError, ProcessesError, ScanError
from ..models.dtypes import STREAM
from ..models.source import ModelSource
from ..progress import say_goes_on, track
from ..scanning.scan import Scan
from ..scanning.shards import ScannedShard, Shards, gather
from ..storage import claimed, raise_output_error, write_file
from ..texts.sources import Texts
from ..values.positions import Positions
from ..values.shard import Shard
from ..values.tokens import Tokens
from .done import Known
from .engines import workers_of
from .inputs import check_made_by, made_by, model_content, texts_inputs
from .scan import ScanJob
from .store import open_store
from .units import Engine, Job, Ledger, drive, threads_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_SHARDS = 64
"""A scan that workers share falls into so many shards, whatever their number."""

NUM_STREAMED = 8
"""So many, where each reads the whole model, and the number of workers is not known."""

OPENER = f"{__name__}:OpenedScan"
"""What a worker opens."""

INCOMPLETE_FILE = "incomplete.json"
"""Names the shards that were given up, with their texts and errors."""


@dataclass(frozen=True, kw_only=True)
class ShardJob(ScanJob):
    """One shard of a scan, into a file of its own in the folder of the scan.

    Attributes:
        shard: which part of all batches.
    """

    shard: Shard

    def __post_init__(self) -> None:
        _check_options(self)
        super().__post_init__()

    @property
    def file(self) -> Path:
        """The file of the shard."""
        return self.out / self.shard.file

    def describe(self) -> dict[str, Any]:
        """Describe what would be done, as :meth:`ScanJob.describe`."""
        return {"shard": str(self.shard), **super().describe()}

    def _look_up(self) -> Known | None:
        """When the shard was scanned, if that very shard is there."""
        if not self.file.is_file() or self.job is None:
            return None
        try:
            found = ScannedShard.load(self.file).of
        except ScanError:
            return None
        if (found.shard, found.job) != (self.shard, self.job) or not found.is_complete:
            return None
        return Known({}, datetime.fromtimestamp(self.file.stat().st_mtime, UTC).isoformat())

    def run_shard(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Scan the shard into its file; an interrupted one goes on where it was."""
        partial = self.file.with_suffix(".partial")
        with claimed(self.file, overwrite=True):
            shards = Shards(
                model,
                tokenizer,
                self.texts,
                self.tokens,
                metrics=self.metrics,
                positions=self.positions,
                threads=self.threads,
                keep_samples=self.keep_samples,
                job=self.job,
            )
            try:
                done = shards.scan(self.shard, checkpoint=partial)
            except ScanError:
                if not self.overwrite:
                    raise
                partial.unlink()
                done = shards.scan(self.shard, checkpoint=partial)
            write_file(self.file, done.to_bytes())
            partial.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class SharedScanJob(ScanJob):
    """A scan that workers share.

    Attributes:
        on: where the workers are: ``local`` processes, or those of a ``ray`` cluster.
        workers: their number; on a cluster as many as it has room for by default.
    """

    on: Literal["local", "ray"] = "local"
    workers: int | None = None

    def __post_init__(self) -> None:
        _check_options(self)
        if self.workers is None and self.on == "local":
            raise ProcessesError("how many processes are to share the scan? (workers, --workers)")
        if self.workers is not None and self.workers < 1:
            raise ProcessesError(f"workers (--workers) is {self.workers}: expected at least 1")
        if not isinstance(self.texts, Texts):
            raise ProcessesError("workers read texts themselves: name a file or a dataset")
        super().__post_init__()

    def describe(self) -> dict[str, Any]:
        """Describe what would be done, as :meth:`ScanJob.describe`."""
        return {"on": self.on, "workers": self.workers, **super().describe()}

    def run_shared(self) -> tuple[Scan, list[Path]]:
        """Let workers scan, each with a model of its own, and put their shards together.

        Shards that an interrupted scan left in the folder are not scanned again. Returns the scan,
        of the bytes that one process finds with as many threads as a worker has, and the files.
        ProcessesError: there are no workers, or shards failed too often; the others stay for the
        same command.
        """
        with claimed(self.file, overwrite=True):
            self._scan_shards()
            places = [self.out / shard.file for shard in self._shards]
            done = self.finish(gather(places))
            for place in places:
                place.unlink()
        return done

    @property
    def _shards(self) -> list[Shard]:
        """All shards; each of a model that is streamed reads all of it."""
        is_streamed = self.source.device_map == STREAM
        count = (self.workers or NUM_STREAMED) if is_streamed else NUM_SHARDS
        return [Shard(index, count) for index in range(count)]

    def _scan_shards(self) -> None:
        done = [str(shard) for shard in self._shards if self._is_there(shard)]
        ledger, record = Ledger(map(str, self._shards), done), _Record(self.out)
        total = len(self._shards)
        if done:
            say_goes_on(f"{len(done)} of {total} shards were scanned")
        with track("scan, shards", total) as advance:
            advance(len(done))

            def accept(unit: str, content: bytes) -> None:
                write_file(self.out / Shard.parse(unit).file, content)
                advance(1)

            if not ledger.is_settled:
                drive(self._engine(), ledger, accept, ready=record.ready)
        record.finish(ledger)

    def _is_there(self, shard: Shard) -> bool:
        """Whether a shard of this very scan lies in its folder; OutputError for one of another."""
        place = self.out / shard.file
        if not place.exists():
            return False
        found = ScannedShard.load(place).of
        is_ours = self.job is not None and found.job == self.job
        if not is_ours and not self.overwrite:
            raise OutputError(
                f"{place} is a shard of another scan: choose another --out, or replace it "
                f"(overwrite=True, --overwrite)"
            )
        return is_ours and found.is_complete

    def _engine(self) -> Engine:
        return workers_of(self._described(), self.workers, on=self.on, gpus=self._gpus())

    def _gpus(self) -> int:
        """The GPUs of a replica, each of ``device_memory``; one where that was not given."""
        is_one = self.on == "local" or self.source.device_map == STREAM
        if is_one or self.device_memory is None:
            return 1
        plan = self.memory(self.source)
        return max(1, -(-(plan.peak_bytes or 0) // plan.device_bytes))

    def _described(self) -> Job:
        """The scan as workers receive it: names, hashes and options, no weights and no texts."""
        assert isinstance(self.texts, Texts)
        described = {
            "source": {**asdict(self.source), "path": _absolute(str(self.source.path))},
            "texts": {"source": _absolute(self.texts.source), "limit": self.texts.limit},
            "tokens": asdict(self.tokens),
            "metrics": list(self.metrics),
            "positions": asdict(self.positions),
            "threads": self.threads,
            "keep_samples": self.keep_samples,
            "job": self.job,
            "shards": len(self._shards),
            "expects": {
                "versions": made_by(),
                "model": model_content(self.source, self.store),
                "texts": texts_inputs(self.texts, self.store),
            },
        }
        return Job(OPENER, described, threads_of(self.workers))


def _check_options(job: ScanJob) -> None:
    """Refuse what only a scan of one process can do."""
    for option, given in (("--keep-states", job.keep_states), ("--until", job.until)):
        if given is not None:
            raise ScanError(
                f"{option} is for a scan of one process, from the first text on: leave it out, or "
                f"--shard, --workers and --on"
            )


def _absolute(place: str) -> str:
    """A place that another process finds, whatever folder it is in; a hub id as it is."""
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place


class OpenedScan:
    """A scan that a worker has opened: model and texts are its own, and those of the driver."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        source, texts = ModelSource(**described["source"]), Texts(**described["texts"])
        self._check(described["expects"], source, texts)
        model, tokenizer = source.load(progress=False)
        self._shards = Shards(
            model,
            tokenizer,
            texts,
            Tokens(**described["tokens"]),
            metrics=described["metrics"],
            positions=Positions(**described["positions"]),
            threads=described["threads"],
            keep_samples=described["keep_samples"],
            job=described["job"],
        )
        shards = [Shard(index, described["shards"]) for index in range(described["shards"])]
        texts_of = {str(shard): self._shards.texts_of(shard) for shard in shards}
        self.hello = {"scan": self._shards.common, "texts": texts_of}

    @staticmethod
    def _check(expects: Mapping[str, Any], source: ModelSource, texts: Texts) -> None:
        """Refuse what is not what the driver has."""
        store = open_store()
        check_made_by(expects["versions"])
        for name, found in (
            ("model", lambda: model_content(source, store)),
            ("texts", lambda: texts_inputs(texts, store)),
        ):
            if expects[name] is not None and found() not in (None, expects[name]):
                place = source if name == "model" else texts.source
                raise ProcessesError(f"{place} on this node is not the {name} of the driver")

    def run(self, unit: str) -> bytes:
        """Scan one shard."""
        return self._shards.scan(Shard.parse(unit), progress=False).to_bytes()


class _Record:
    """What workers have opened, and what was given up."""

    def __init__(self, out: Path) -> None:
        self._place = out / INCOMPLETE_FILE
        self._first: tuple[str, Any] | None = None
        self._texts: Mapping[str, Any] = {}

    def ready(self, worker: str, hello: Mapping[str, Any]) -> None:
        """Hold what a worker has opened against the first one's; ProcessesError."""
        if self._first is None:
            self._first = worker, hello["scan"]
        other, expected = self._first
        for name, value in expected.items():
            if hello["scan"][name] != value:
                raise ProcessesError(
                    f"{other} and {worker} differ in {name} ({value} and {hello['scan'][name]}): "
                    f"name what is chosen by machine (--dtype), or use like machines"
                )
        self._texts = hello["texts"]

    def finish(self, ledger: Ledger) -> None:
        """Write what was given up, and say so: ProcessesError."""
        with raise_output_error(self._place):
            self._place.unlink(missing_ok=True)
        if not ledger.given_up:
            return
        found = [
            {"shard": unit, "texts": self._texts.get(unit), "errors": errors}
            for unit, errors in ledger.given_up.items()
        ]
        write_file(self._place, (json.dumps(found, indent=2) + "\n").encode())
        unit, errors = next(iter(ledger.given_up.items()))
        raise ProcessesError(
            f"the scan is incomplete: {len(found)} of its shards failed {len(errors)} times each "
            f"({self._place}), shard {unit} by {errors[-1]}; the others are kept, and the same "
            f"command tries these again"
        )
