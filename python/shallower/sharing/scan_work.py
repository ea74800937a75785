"""A scan that is shared, in shards of its batches."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ProcessesError, ScanError
from ..models.source import ModelSource
from ..reporting.charts.heat_map import draw_heat_map
from ..scanning.scan import Scan
from ..scanning.scan_file import read_text, scan_bytes, scan_text
from ..scanning.shards import Shards, joined
from ..settings.stages import ScanSettings
from ..storage import absolute, check_free, claimed, holds, write_file
from ..store.inputs import texts_content
from ..texts.sources import Texts, place_of_texts
from ..values.files import HEAT_MAP_FILE, SCAN_FILE
from ..values.positions import Positions
from ..values.shard import Shard
from .shards import MadeShard, values_of
from .work import Batches, OpenedBatches


class OpenedScan(OpenedBatches):
    """A scan that is opened."""

    def open(self, source: ModelSource) -> Shards:
        """Check the texts, and load the model."""
        from ..models.decoder import Decoder

        described = self.described
        texts = Texts(**described["texts"])
        self.agree("texts", texts.source, lambda: texts_content(texts, self.store))
        model, tokenizer = source.load(progress=self.progress)
        self._batches = Shards(
            Decoder.of(model, self.content),
            tokenizer,
            texts,
            ScanSettings(**described["settings"], positions=Positions(**described["positions"])),
        )
        return self._batches

    def value(self, unit: str) -> dict[str, Any]:
        """Scan one part; by hand it goes on where it was interrupted."""
        checkpoint = self.folder and self.folder / "begun"
        shard, progress = Shard.parse(unit), self.progress
        found = self._batches.scan(shard, checkpoint=checkpoint, progress=progress)
        return {"content": scan_text(found)}


class ScanWork(Batches):
    """A scan."""

    kind, results, opens = "scan", SCAN_FILE, OpenedScan

    def prepare(self) -> None:
        """Refuse what only a scan of one process can do, and texts that were given."""
        super().prepare()
        if self.job.until is not None:
            raise ScanError(
                "--until is for a scan of one process, from the first text on: leave it out, or "
                "--shard, --workers and --on"
            )
        _described_texts(self.job.texts)
        self.reads = [self.job.source.place, place_of_texts(self.job.texts)]

    def described(self) -> dict[str, Any]:
        """Describe the scan; files may change, so all is identified before anything is read."""
        self.job.identify()
        job, found = self.job, super().described()
        found["expects"]["texts"] = texts_content(job.texts, job.store)
        options = ("max_length", "batch_size", "metrics", "threads", "keep_samples", "experts")
        return {
            **found,
            "texts": _described_texts(job.texts),
            "settings": {name: getattr(job, name) for name in options},
            "positions": asdict(job.positions),
        }

    def joined(self, values: Sequence[Any]) -> tuple[Scan, list[Path]]:
        """Put parts together, and write the scan and its heat map."""
        return self.job.finish(joined([read_text(value["content"]) for value in values]))

    @classmethod
    def gather(
        cls, shards: Sequence[MadeShard], out: Path, *, overwrite: bool, **_: bool
    ) -> tuple[Scan, list[Path]]:
        """Put shards together, and write the scan and its heat map."""
        scanned, file = scan_of(shards), out / SCAN_FILE
        content = scan_bytes(scanned.contents)
        overwrite = overwrite or holds(file, content)
        for name in (SCAN_FILE, HEAT_MAP_FILE):
            check_free(out / name, overwrite)
        with claimed(file, overwrite):
            write_file(file, content)
            return scanned, [file, *draw_heat_map(scanned, out)]


def scan_of(shards: Sequence[MadeShard]) -> Scan:
    """The scan of all shards; ScanError: one is damaged. StatesError: no sample was accepted."""
    return joined([read_text(one["content"]) for one in values_of(shards, dict[str, str])])


def _described_texts(texts: object) -> dict[str, Any]:
    """Describe texts as workers read them themselves; ProcessesError where they were given."""
    if not isinstance(texts, Texts):
        raise ProcessesError("workers read texts themselves: name a file or a dataset")
    return {"source": absolute(texts.source), "limit": texts.limit}
