"""What a kind of work supplies to be shared: what it is of, what workers open, where results go."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from ..errors import OutputError, ProcessesError, ScanError, SettingsError, raise_output_error
from ..models.source import ModelSource
from ..storage import absolute, claimed, write_file
from ..store.inputs import check_made_by, made_by, model_content
from ..store.store import open_store
from ..values.memory import MemoryPlan
from ..values.shard import NAMES, Shard, read_shards
from ..workers.units import Ledger
from .engines import cards_for, seats

NUM_SHARDS = 64
"""A work that workers share falls into so many shards, whatever their number."""

NUM_STREAMED = 8
"""So many, where each reads the whole model, and the number of workers is not known."""

INCOMPLETE_FILE = "incomplete.json"
"""Names the shards that were given up, with their texts and errors."""


class Opened(ABC):
    """A work that is opened: by a worker, or by hand a ``job`` with a ``folder`` for what is begun.

    ``hello`` is what all workers must have in common, and the texts of every shard, for a record of
    those that failed. ProcessesError: packages are not those of whoever described it.
    """

    hello: Mapping[str, Any] = {"common": {}, "texts": {}}

    def __init__(
        self, described: Mapping[str, Any], folder: Path | None = None, job: Any = None
    ) -> None:
        check_made_by(described["expects"]["versions"])
        self.described, self.folder, self.job = described, folder, job
        self.progress = False if folder is None else None

    @abstractmethod
    def run(self, unit: str) -> bytes:
        """Do one unit."""

    def shard(self, shard: Shard) -> bytes:
        """Give the file of a shard."""
        return self.run(str(shard))


class SharedWork(ABC):
    """A scan, an eval or a study, and who does which part of it.

    A kind supplies what stands here without a value; how it is ``described`` as plain JSON, without
    weights and texts, and its folder ``held``; which units are ``done``, how the result of one is
    kept and that of none said (``keep``, ``give_up``); and how all results come together: where
    they were kept (``finish``), or from anywhere (``gather``).

    Attributes:
        job: the :class:`ScanJob`, :class:`EvalJob` or :class:`Study`.
        out: its folder; None for none.
        shard: which part is made by hand; None where workers share all of it.
        on: where workers are: ``local`` processes, or those of a ``ray`` cluster.
        workers: their number; on a cluster as many as it has room for by default.
        models: what workers load.
        reads: the places that are read, by their text.
        units: what workers do, one at a time.
    """

    kind: ClassVar[str]
    results: ClassVar[str]
    opens: ClassVar[type[Opened]]
    content: ClassVar[Any]
    models: Sequence[ModelSource]
    reads: Sequence[object]
    units: Sequence[str]

    def __init__(
        self,
        job: Any,
        *,
        shard: Shard | None = None,
        on: Literal["local", "ray"] = "local",
        workers: int | None = None,
    ) -> None:
        self.job, self.shard, self.on, self.workers = job, shard, on, workers
        self.out: Path | None = job.out
        self._first: tuple[str, Any] | None = None
        self._texts: Mapping[str, Any] = {}
        self.prepare()
        is_counted = shard is not None or workers is not None or on != "local"
        if not is_counted and not any(cards_for(one.device_map) for one in self.models):
            raise ProcessesError(
                f"how many processes are to share the {NAMES[self.kind]}? (workers, --workers)"
            )
        if workers is not None and workers < 1:
            raise ProcessesError(f"workers (--workers) is {workers}: expected at least 1")

    @abstractmethod
    def prepare(self) -> None:
        """Refuse what cannot be shared, and set ``models``, ``reads`` and ``units``."""

    def ready(self, worker: str, hello: Mapping[str, Any]) -> None:
        """Hold what a worker has opened against the first one's; ProcessesError."""
        other, expected = self._first = self._first or (worker, hello["common"])
        for name, value in expected.items():
            if hello["common"][name] != value:
                raise ProcessesError(
                    f"{other} and {worker} differ in {name} ({value} and {hello['common'][name]}): "
                    f"name what is chosen by machine (--dtype), or use like machines"
                )
        self._texts = hello["texts"]

    def place(self, shard: Shard) -> Path:
        """The file of a shard; SettingsError for a work without a folder."""
        if self.out is None:
            raise SettingsError("a shard is a file: name the folder to write it to (--out)")
        return self.out / shard.file_of(self.kind)

    def made(self, shard: Shard) -> str | None:
        """When a shard was made, in ISO 8601, if that very shard is there, whole.

        OutputError: something else is there, and not to be replaced.
        """
        place = self.place(shard)
        if not place.exists():
            return None
        fault = f"{place} exists already, and is no shard of this work"
        try:
            found = self.content.load(place)
            if (job := self.job.job) is None:
                fault = (
                    f"{place} exists already, and the files of model and texts do not show of what"
                )
            elif (found.shard, found.job, found.is_complete) == (shard, job, True):
                return datetime.fromtimestamp(place.stat().st_mtime, UTC).isoformat()
        except ScanError as error:
            fault = str(error)
        if self.job.overwrite:
            return None
        way_out = "choose another --out, or replace it (overwrite=True, --overwrite)"
        raise OutputError(f"{fault}: {way_out}")


class OpenedBatches(Opened):
    """Batches of all texts; model and texts are those of whoever described the work."""

    def __init__(
        self, described: Mapping[str, Any], folder: Path | None = None, job: Any = None
    ) -> None:
        super().__init__(described, folder, job)
        self.store = open_store(described["no_cache"])
        source = ModelSource(**described["source"]) if job is None else job.source
        self.content = described["expects"]["model"]
        self.agree("model", str(source), lambda: model_content(source, self.store))
        of = self.batches = self.open(source)
        texts = {unit: of.texts_of(Shard.parse(unit)) for unit in described["units"]}
        self.hello = {"common": of.common, "texts": texts}

    def agree(self, name: str, place: str | None, found: Callable[[], Any]) -> None:
        """Refuse what is not what the driver has: ProcessesError."""
        wanted = self.described["expects"][name] if self.job is None else None
        if wanted is not None and found() != wanted:
            raise ProcessesError(f"{place} on this node is not that of the driver, or not there")

    @abstractmethod
    def open(self, source: ModelSource) -> Any:
        """Check the texts, load the model, and give what has ``common`` and ``texts_of``."""


class Batches(SharedWork):
    """A scan or an eval: a unit is a shard of its batches, and lies in the folder as a file."""

    unit_names, is_exact, is_known = "shards", True, False

    def prepare(self) -> None:
        """Set the shards; each of a model that is streamed reads all of it."""
        source = self.job.source
        count = (self.workers or NUM_STREAMED) if source.is_streamed else NUM_SHARDS
        self.shards = [Shard(index, count) for index in range(count)]
        self.models, self.units = [source], list(map(str, self.shards))

    def memory(self) -> MemoryPlan:
        """Forecast what a replica takes."""
        return self.job.memory(self.job.source, processes=2)

    def described(self) -> dict[str, Any]:
        """Describe what a scan and an eval have in common; each adds what it is of which texts."""
        job, source = self.job, self.job.source
        return {
            "kind": self.kind,
            "source": {**asdict(source), "path": absolute(str(source.path))},
            "job": job.job,
            "units": self.units,
            "no_cache": job.store.folder is None,
            "expects": {"versions": made_by(), "model": job.content},
        }

    def describe(self) -> dict[str, Any]:
        """Describe what would be done, and what each worker would get; ProcessesError."""
        if self.shard is not None:
            self.made(self.shard)
            write = {"write": [str(self.place(self.shard))]}
            return {"shard": str(self.shard), **self.job.describe(), **write}
        plan = self.memory()
        found = {**self.job.describe(plan), "on": self.on, "workers": self.workers, "memory": plan}
        if self.on == "local":
            mine = seats(self.job.source.device_map, self.workers, lambda: plan)
            found |= {"workers": len(mine), "threads": mine[0].threads}
            cards = [one.cards for one in mine if one.cards is not None]
            found |= {"gpus": " ".join(cards)} if cards else {}
        return found

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the file of the work against other processes, or work in a folder that goes."""
        with ExitStack() as held:
            if self.job.out is None:
                self.out = Path(held.enter_context(TemporaryDirectory(prefix="shallower-")))
            else:
                held.enter_context(claimed(self.job.file, overwrite=True))
            yield

    def done(self) -> list[str]:
        """The shards that lie in the folder; OutputError for one of other work."""
        return [str(shard) for shard in self.shards if self.made(shard)]

    def keep(self, unit: str, content: bytes) -> None:
        """Write a shard."""
        write_file(self.place(Shard.parse(unit)), content)

    def give_up(self, ledger: Ledger) -> None:
        """Write what was given up, and say so: ProcessesError."""
        assert self.out is not None
        place = self.out / INCOMPLETE_FILE
        with raise_output_error(place):
            place.unlink(missing_ok=True)
        if not ledger.given_up:
            return
        found = [
            {"shard": unit, "texts": self._texts.get(unit), "errors": errors}
            for unit, errors in ledger.given_up.items()
        ]
        write_file(place, (json.dumps(found, indent=2) + "\n").encode())
        unit, errors = next(iter(ledger.given_up.items()))
        where, way_out = "", "name a folder to keep the others (--out)"
        if self.job.out is not None:
            where = f" ({place})"
            way_out = "the others are kept, and the same command tries these again"
        raise ProcessesError(
            f"the {self.kind} is incomplete: {len(found)} of its shards failed {len(errors)} "
            f"times each{where}, shard {unit} by {errors[-1]}; {way_out}"
        )

    def finish(self) -> Any:
        """Put the shards of the folder together, which go then."""
        places = list(map(self.place, self.shards))
        done = self.joined(read_shards(places, self.content.load, self.kind))
        for place in places:
            place.unlink()
        return done

    @abstractmethod
    def joined(self, shards: Sequence[Any]) -> Any:
        """Put shards together, as what one process finds."""
