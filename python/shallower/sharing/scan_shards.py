"""Shards of a scan: one by hand, or all of them by workers, into the folder of the scan."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ScanError
from ..models.source import ModelSource
from ..scanning.scan import Scan
from ..scanning.shards import ScannedShard, Shards, gather
from ..storage import claimed, write_file
from ..store.done import Known
from ..store.inputs import texts_content
from ..studies.scan import ScanJob
from ..texts.sources import Texts
from ..values.memory import MemoryPlan
from ..values.positions import Positions
from ..values.shard import Shard
from ..values.tokens import Tokens
from .shards import (
    OpenedShards,
    SharedJob,
    SharedShards,
    check_workers,
    described_texts,
    described_workers,
    when_made,
)

OPENER = f"{__name__}:OpenedScan"
"""What a worker opens."""


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

    def describe(self, memory: MemoryPlan | None = None) -> dict[str, Any]:
        """Describe what would be done, as :meth:`ScanJob.describe`."""
        return {"shard": str(self.shard), **super().describe(memory)}

    def _look_up(self) -> Known | None:
        """When the shard was scanned, if that very shard is there."""
        place, load, overwrite = self.file, ScannedShard.load, self.overwrite
        made = when_made(place, self.shard, lambda: self.job, load=load, overwrite=overwrite)
        return None if made is None else Known({}, made)

    def run_shard(self) -> None:
        """Scan the shard into its file; an interrupted one goes on where it was."""
        from ..models.decoder import Decoder

        job = self.job  # of the files that are loaded then
        model, tokenizer = self.source.load()
        partial = self.file.with_suffix(".partial")
        with claimed(self.file, overwrite=True):
            shards = Shards(
                Decoder.of(model, self.content),
                tokenizer,
                self.texts,
                self.tokens,
                metrics=self.metrics,
                positions=self.positions,
                threads=self.threads,
                keep_samples=self.keep_samples,
                experts=self.experts,
                job=job,
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
class SharedScanJob(SharedJob, ScanJob):
    """A scan that workers share."""

    def __post_init__(self) -> None:
        _check_options(self)
        check_workers(self.workers, self.on, "scan", self.source)
        described_texts(self.texts)
        super().__post_init__()

    def describe(self, memory: MemoryPlan | None = None) -> dict[str, Any]:
        """Describe what would be done, as :meth:`ScanJob.describe`, and what each worker gets."""
        plan = memory or self.memory(self.source, processes=2)
        shared = described_workers(self.source, self.workers, on=self.on, plan=plan)
        return {**super().describe(plan), **shared}

    def run_shared(self) -> tuple[Scan, list[Path]]:
        """Let workers scan, each with a model of its own, and put their shards together.

        Shards that an interrupted scan left in the folder are not scanned again. Returns the scan,
        of the bytes that one process finds with as many threads as a worker has, and the files.
        ProcessesError: there are no workers, or shards failed too often; the others stay for the
        same command.
        """
        self.identify()
        with claimed(self.file, overwrite=True):
            shared = self.shared()
            shared.make()
            done = self.finish(gather(shared.files))
            for place in shared.files:
                place.unlink()
        return done

    def shared(self) -> SharedShards:
        """The scan as workers receive it: names, hashes and options, no weights and no texts."""
        options = {
            "texts": described_texts(self.texts),
            "tokens": asdict(self.tokens),
            "metrics": list(self.metrics),
            "positions": asdict(self.positions),
            "threads": self.threads,
            "keep_samples": self.keep_samples,
            "experts": self.experts,
        }
        return self.shards_of(
            "scan",
            self.out,
            opener=OPENER,
            load=ScannedShard.load,
            options=options,
            expects={"texts": texts_content(self.texts, self.store)},
        )


def _check_options(job: ScanJob) -> None:
    """Refuse what only a scan of one process can do."""
    if job.until is not None:
        raise ScanError(
            "--until is for a scan of one process, from the first text on: leave it out, or "
            "--shard, --workers and --on"
        )


class OpenedScan(OpenedShards):
    """A scan that a worker has opened."""

    def open(self, source: ModelSource, described: Mapping[str, Any]) -> Shards:
        """Check the texts, and load the model."""
        from ..models.decoder import Decoder

        texts = Texts(**described["texts"])
        self.check("texts", texts.source, lambda: texts_content(texts, self.store))
        model, tokenizer = source.load(progress=False)
        self._shards = Shards(
            Decoder.of(model, self.content),
            tokenizer,
            texts,
            Tokens(**described["tokens"]),
            metrics=described["metrics"],
            positions=Positions(**described["positions"]),
            threads=described["threads"],
            keep_samples=described["keep_samples"],
            experts=described["experts"],
            job=described["job"],
        )
        return self._shards

    def run(self, unit: str) -> bytes:
        """Scan one shard."""
        return self._shards.scan(Shard.parse(unit), progress=False).to_bytes()
