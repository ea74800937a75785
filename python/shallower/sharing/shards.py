"""Work that falls into shards: one by hand, or all of them by workers, into the folder of the work.

What lies there is done; who drives asks for the rest (:mod:`shallower.workers.units`).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from ..errors import OutputError, ProcessesError, ScanError, raise_output_error
from ..models.source import ModelSource
from ..storage import write_file
from ..store.inputs import check_made_by, made_by, model_content
from ..store.store import Store, open_store
from ..texts.sources import Texts
from ..values.memory import MemoryPlan
from ..values.shard import Shard, ShardContent
from ..workers.units import Job, Ledger
from .engines import Memory, cards_for, hand_out, seats

NUM_SHARDS = 64
"""A work that workers share falls into so many shards, whatever their number."""

NUM_STREAMED = 8
"""So many, where each reads the whole model, and the number of workers is not known."""

INCOMPLETE_FILE = "incomplete.json"
"""Names the shards that were given up, with their texts and errors."""

Load = Callable[[Path], ShardContent]
"""Reads a shard from its file; ScanError where it is none."""


def when_made(
    place: Path, shard: Shard, job: Callable[[], str | None], *, load: Load, overwrite: bool
) -> str | None:
    """Tell when a shard was made, in ISO 8601, if that very shard lies at its place, whole.

    ``job`` names its work. OutputError: something else is there, and not to be replaced.
    """
    if not place.exists():
        return None
    fault = f"{place} exists already, and is no shard of this work"
    try:
        found = load(place)
        if (name := job()) is None:
            fault = f"{place} exists already, and the files of model and texts do not show of what"
        elif (found.shard, found.job, found.is_complete) == (shard, name, True):
            return datetime.fromtimestamp(place.stat().st_mtime, UTC).isoformat()
    except ScanError as error:
        fault = str(error)
    if overwrite:
        return None
    raise OutputError(f"{fault}: choose another --out, or replace it (overwrite=True, --overwrite)")


def check_workers(workers: int | None, on: str, kind: str, *models: ModelSource) -> None:
    """Refuse a number of workers that there cannot be: ProcessesError."""
    if workers is None and on == "local" and not any(cards_for(one.device_map) for one in models):
        raise ProcessesError(f"how many processes are to share the {kind}? (workers, --workers)")
    if workers is not None and workers < 1:
        raise ProcessesError(f"workers (--workers) is {workers}: expected at least 1")


def described_workers(
    source: ModelSource, workers: int | None, *, on: str, plan: MemoryPlan
) -> dict[str, Any]:
    """Describe what workers take, and get here; ProcessesError: there is not enough."""
    shared: dict[str, Any] = {"on": on, "workers": workers, "memory": plan}
    if on == "local":
        found = seats(source.device_map, workers, lambda: plan)
        shared |= {"workers": len(found), "threads": found[0].threads}
        cards = [one.cards for one in found if one.cards is not None]
        shared |= {"gpus": " ".join(cards)} if cards else {}
    return shared


def described_texts(texts: object) -> dict[str, Any]:
    """Describe texts as workers read them themselves; ProcessesError where they were given."""
    if not isinstance(texts, Texts):
        raise ProcessesError("workers read texts themselves: name a file or a dataset")
    return {"source": absolute(texts.source), "limit": texts.limit}


def absolute(place: str) -> str:
    """A place that another process finds, whatever folder it is in; a hub id as it is."""
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place


@dataclass(frozen=True, kw_only=True)
class SharedShards:
    """The shards of a work, which workers make, each with a model of its own.

    Attributes:
        kind: of the work, ``scan`` or ``eval``.
        source: the model.
        out: the folder of the work.
        job: a hash of all that the work depends on; None where that is not known.
        content: a hash of the files of the model; None where that is not known.
        overwrite: replace shards of other work.
        load: reads a shard.
        opener: what a worker opens, as that of a :class:`Job`.
        options: those of the work, plain JSON values.
        expects: what a worker's own inputs must be, by their names.
        on: as of :class:`SharedJob`.
        workers: as of it.
        memory: forecasts what a replica takes.
        device_memory: that of a GPU, where it is given.
        store: what is known of the content of files.
        is_kept: whether the folder outlives the work.
    """

    kind: str
    source: ModelSource
    out: Path
    job: str | None
    content: str | None
    overwrite: bool
    load: Load
    opener: str
    options: Mapping[str, Any]
    expects: Mapping[str, Any]
    on: Literal["local", "ray"]
    workers: int | None
    memory: Memory
    device_memory: str | None
    store: Store
    is_kept: bool = True

    @property
    def shards(self) -> list[Shard]:
        """All shards; each of a model that is streamed reads all of it."""
        of_streamed = self.workers or NUM_STREAMED
        count = of_streamed if self.source.waits_on_disk else NUM_SHARDS
        return [Shard(index, count) for index in range(count)]

    @property
    def files(self) -> list[Path]:
        """The places of all shards."""
        return [self._place(shard) for shard in self.shards]

    def make(self) -> None:
        """Let workers make the shards that are not there.

        ProcessesError: there are no workers, or shards failed too often; the others stay.
        OutputError: a shard of other work is in the way.
        """
        record = _Record(self)
        ledger = hand_out(
            self.described(),
            list(map(str, self.shards)),
            [str(shard) for shard in self.shards if self._is_there(shard)],
            name=f"{self.kind}, shards",
            keep=lambda shard, content: write_file(self._place(Shard.parse(shard)), content),
            ready=record.ready,
            workers=self.workers,
            on=self.on,
            memory=self.memory,
            device_memory=self.device_memory,
        )
        record.finish(ledger)

    def _place(self, shard: Shard) -> Path:
        return self.out / shard.file_of(self.kind)

    def _is_there(self, shard: Shard) -> bool:
        """Whether a shard of this very work lies in its folder; OutputError for one of another."""
        place, job = self._place(shard), lambda: self.job
        made = when_made(place, shard, job, load=self.load, overwrite=self.overwrite)
        return made is not None

    def described(self) -> Job:
        """The work as a worker opens it: names, hashes and options, no weights and no texts."""
        described = {
            **self.options,
            "source": {**asdict(self.source), "path": absolute(str(self.source.path))},
            "job": self.job,
            "shards": len(self.shards),
            "no_cache": self.store.folder is None,
            "expects": {"versions": made_by(), "model": self.content, **self.expects},
        }
        return Job(self.opener, described)


@dataclass(frozen=True, kw_only=True)
class SharedJob:
    """What a scan and an eval that workers share have beside those of one process.

    Attributes:
        on: where the workers are: ``local`` processes, or those of a ``ray`` cluster.
        workers: their number; on a cluster as many as it has room for by default.
    """

    on: Literal["local", "ray"] = "local"
    workers: int | None = None

    def shards_of(self: Any, kind: str, out: Path, **more: Any) -> SharedShards:
        """The shards of the job, which workers make in a folder."""
        own = ("source", "job", "content", "overwrite", "on", "workers", "device_memory", "store")
        return SharedShards(
            kind=kind,
            out=out,
            memory=lambda: self.memory(self.source, processes=2),
            **{name: getattr(self, name) for name in own},
            **more,
        )


class ShardMaker(Protocol):
    """A work that is opened, of which any shard can be made."""

    @property
    def common(self) -> Mapping[str, object]:
        """What is the same wherever the same work is opened, by the words of an error."""

    def texts_of(self, shard: Shard) -> Any:
        """Name the texts of a shard, for a record of those that failed."""


class OpenedShards(ABC):
    """Shards that a worker has opened: model and texts are its own, and those of the driver."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._expects = described["expects"]
        check_made_by(self._expects["versions"])
        self.store, source = open_store(described["no_cache"]), ModelSource(**described["source"])
        self.content = self._expects["model"]
        self.check("model", str(source), lambda: model_content(source, self.store))
        work = self.open(source, described)
        shards = [Shard(index, described["shards"]) for index in range(described["shards"])]
        texts = {str(shard): work.texts_of(shard) for shard in shards}
        self.hello = {"common": work.common, "texts": texts}

    def check(self, name: str, place: str, found: Callable[[], Any]) -> None:
        """Refuse what is not what the driver has: ProcessesError."""
        if self._expects[name] is not None and found() != self._expects[name]:
            raise ProcessesError(f"{place} on this node is no {name} of the driver, or not there")

    @abstractmethod
    def open(self, source: ModelSource, described: Mapping[str, Any]) -> ShardMaker:
        """Check the texts, and load the model."""

    @abstractmethod
    def run(self, unit: str) -> bytes:
        """Make one shard."""


class _Record:
    """What workers have opened, and what was given up."""

    def __init__(self, of: SharedShards) -> None:
        self._of, self._place = of, of.out / INCOMPLETE_FILE
        self._first: tuple[str, Any] | None = None
        self._texts: Mapping[str, Any] = {}

    def ready(self, worker: str, hello: Mapping[str, Any]) -> None:
        """Hold what a worker has opened against the first one's; ProcessesError."""
        if self._first is None:
            self._first = worker, hello["common"]
        other, expected = self._first
        for name, value in expected.items():
            if hello["common"][name] != value:
                raise ProcessesError(
                    f"{other} and {worker} differ in {name} ({value} and {hello['common'][name]}): "
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
        place, way_out = "", "name a folder to keep the others (--out)"
        if self._of.is_kept:
            place = f" ({self._place})"
            way_out = "the others are kept, and the same command tries these again"
        raise ProcessesError(
            f"the {self._of.kind} is incomplete: {len(found)} of its shards failed {len(errors)} "
            f"times each{place}, shard {unit} by {errors[-1]}; {way_out}"
        )
