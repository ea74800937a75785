"""A scan that is shared, in shards of its batches."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ProcessesError, ScanError
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
from .work import Batches, Opened, agree, opened_source, progress_of, texts_of


def open_scan(described: Mapping[str, Any], folder: Path | None, job: Any) -> Opened:
    """Check the texts, and load the model; a part by hand goes on where it was interrupted."""
    from ..models.decoder import Decoder

    source, store, expects = opened_source(described, job)
    texts, progress = Texts(**described["texts"]), progress_of(folder)
    agree(expects.get("texts"), texts.source, lambda: texts_content(texts, store))
    model, tokenizer = source.load(progress=progress)
    shards = Shards(
        Decoder.of(model, described["expects"]["model"]),
        tokenizer,
        texts,
        ScanSettings(**described["settings"], positions=Positions(**described["positions"])),
    )

    def value(unit: str) -> dict[str, Any]:
        begun = folder and folder / "begun"
        found = shards.scan(Shard.parse(unit), checkpoint=begun, progress=progress)
        return {"content": scan_text(found)}

    return Opened(described, value, shards.common, texts_of(shards, described))


class ScanWork(Batches):
    """A scan."""

    kind, results, opens = "scan", SCAN_FILE, staticmethod(open_scan)

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
