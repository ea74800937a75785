"""What a kind of work supplies to be shared: what it is of, what workers open, where results go."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from ..errors import OutputError, ProcessesError, ScanError, SettingsError, raise_output_error
from ..models.source import ModelSource
from ..storage import absolute, claimed, write_file
from ..store.inputs import made_by, model_content
from ..store.store import Entries, Store, open_store
from ..values.estimates import MemoryPlan
from ..values.shard import NAMES, Shard
from ..workers.units import Ledger
from .engines import cards_for, seats
from .shards import MadeShard

NUM_SHARDS = 64
"""A scan or an eval that workers share falls into so many shards, whatever their number."""

NUM_STREAMED = 8
"""So many, where each reads the whole model, and the number of workers is not known."""

INCOMPLETE_FILE = "incomplete.json"
"""Names the shards that were given up, with their texts and errors."""

PARTS_FOLDER = ".parts"
"""The store of the parts of a scan or an eval, in its folder until all are done."""


@dataclass
class Opened:
    """A work that is opened, by a worker or by hand; ``value`` does a unit, and gives plain JSON.

    ``common`` is common to all processes, by the words of an error; ``texts`` are those of every
    unit, for a record of those that failed. ``entries`` gives what the store has more than was
    given before; by ``values`` units are done by hand, one after the other, and those noted that
    others do without.
    """

    described: Mapping[str, Any]
    value: Callable[[str], dict[str, Any]]
    common: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, Any] = field(default_factory=dict)
    entries: Callable[[], Entries] = dict
    values: Callable[[Sequence[str], dict[str, str]], dict[str, Any]] | None = None

    @property
    def hello(self) -> dict[str, Any]:
        """What a worker says once it has opened the work."""
        return {"common": self.common, "texts": self.texts}

    def run(self, unit: str) -> bytes:
        """Do one unit, for whoever described the work."""
        return json.dumps({"value": self.value(unit), "entries": self.entries()}).encode()

    def shard(self, shard: Shard) -> MadeShard:
        """Do every N-th unit."""
        described, failed = self.described, dict[str, str]()
        units = described["units"][shard.index :: shard.count]
        if self.values is None:
            values = {unit: self.value(unit) for unit in units}
        else:
            values = self.values(units, failed)
        return MadeShard(
            described["kind"],
            shard,
            described["job"],
            versions=described["expects"]["versions"],
            common=self.common,
            described=described,
            values=values,
            entries=self.entries(),
            failed=failed,
        )


class SharedWork(ABC):
    """A scan, an eval or a study, and who does which part of it.

    The value of each unit goes into a store. A kind supplies what stands here without a value, and
    how all values come together: of the store (``finish``), or of shards (``gather``).
    """

    kind: str
    results: ClassVar[str]
    opens: ClassVar[Callable[..., Opened]]
    unit_names, is_exact = "parts", True
    models: Sequence[ModelSource]  # what workers load
    reads: Sequence[object]  # the places that are read, by their text
    units: Sequence[str]  # what workers do, one at a time
    store: Store  # of the values of units

    def __init__(
        self,
        job: Any,  # a :class:`ScanJob`, :class:`EvalJob` or :class:`Study`
        *,
        shard: Shard | None = None,  # the part that is made by hand; else workers share all
        on: Literal["local", "ray"] = "local",  # processes, or workers of a cluster
        workers: int | None = None,  # by default as many as a cluster has room for
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

    @property
    def is_known(self) -> bool:
        """Whether all of it is known before."""
        return False

    @abstractmethod
    def prepare(self) -> None:
        """Refuse what cannot be shared, and set ``models``, ``reads`` and ``units``."""

    @abstractmethod
    def memory(self) -> MemoryPlan:
        """Forecast what a replica takes."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Describe the work as plain JSON, without weights and texts."""

    @abstractmethod
    def held(self) -> AbstractContextManager[None]:
        """Hold the place of the results against other processes."""

    @abstractmethod
    def give_up(self, ledger: Ledger) -> None:
        """Say which units failed too often; ProcessesError where nothing can be done without."""

    @abstractmethod
    def finish(self) -> Any:
        """Put the values of all units together, as one process finds them."""

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

    def inputs(self, unit: str) -> dict[str, Any]:
        """All that the value of a unit depends on."""
        return {"job": self.job.job, "unit": unit}

    def value(self, unit: str) -> dict[str, Any] | None:
        """The value of a unit; None where it is not done."""
        return self.store.get("study", self.inputs(unit))

    def done(self) -> list[str]:
        """The units that were done before."""
        return [unit for unit in self.units if self.value(unit) is not None]

    def keep(self, unit: str, content: bytes) -> None:
        """Keep what a worker has found."""
        found = json.loads(content)
        self.store.take(found["entries"])
        self.store.put("study", self.inputs(unit), found["value"])

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
            found = MadeShard.load(place)
            if (job := self.job.job) is None:
                fault = (
                    f"{place} exists already, and the files of model and texts do not show of what"
                )
            elif (found.shard, found.job) == (shard, job):
                return datetime.fromtimestamp(place.stat().st_mtime, UTC).isoformat()
        except ScanError as error:
            fault = str(error)
        if self.job.overwrite:
            return None
        way_out = "choose another --out, or replace it (overwrite=True, --overwrite)"
        raise OutputError(f"{fault}: {way_out}")


def opened_source(
    described: Mapping[str, Any], job: Any
) -> tuple[ModelSource, Store, Mapping[str, Any]]:
    """The model of whoever described batches of texts, its store, and what is expected of them.

    By hand they are those of a job, of which nothing is expected. ProcessesError: it is another
    model.
    """
    store = open_store(described["no_cache"])
    source = ModelSource(**described["source"]) if job is None else job.source
    expects = described["expects"] if job is None else {}
    agree(expects.get("model"), str(source), lambda: model_content(source, store))
    return source, store, expects


def agree(wanted: Any, place: str | None, found: Callable[[], Any]) -> None:
    """Refuse what is not what the driver has, where that is known: ProcessesError."""
    if wanted is not None and found() != wanted:
        raise ProcessesError(f"{place} on this node is not that of the driver, or not there")


def progress_of(folder: Path | None) -> bool | None:
    """Whether bars are shown: by hand, where there is a folder for what is begun."""
    return False if folder is None else None


def texts_of(shards: Any, described: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of every unit, which is a shard of batches."""
    return {unit: shards.texts_of(Shard.parse(unit)) for unit in described["units"]}


class Batches(SharedWork):
    """A scan or an eval: a unit is an equal part of its batches."""

    unit_names = "shards"

    def prepare(self) -> None:
        """Set the units; each of a model that is streamed reads all of it."""
        source = self.job.source
        count = (self.workers or NUM_STREAMED) if source.is_streamed else NUM_SHARDS
        count = count if self.shard is None else self.shard.count
        self.models, self.units = [source], [str(Shard(index, count)) for index in range(count)]

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
            assert self.out is not None
            if self.job.job is None:  # nobody knows of what the parts are that are there
                shutil.rmtree(self.out / PARTS_FOLDER, ignore_errors=True)
            self.store = Store(self.out / PARTS_FOLDER)
            if common := self.store.get("study", self.inputs("common")):
                self._first = "an earlier worker", common
            yield

    def ready(self, worker: str, hello: Mapping[str, Any]) -> None:
        """Hold what a worker has opened against the first one's, also of a command before."""
        super().ready(worker, hello)
        self.store.put("study", self.inputs("common"), hello["common"])

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
        """Put the values of all units together; their store goes then. OutputError: one is lost."""
        assert self.out is not None
        values = [self.value(unit) for unit in self.units]
        if None in values:
            raise OutputError(
                f"{self.out / PARTS_FOLDER} has not kept all that workers found: free its disk, "
                f"and run the same command again"
            )
        done = self.joined(values)
        shutil.rmtree(self.out / PARTS_FOLDER, ignore_errors=True)
        return done

    @abstractmethod
    def joined(self, values: Sequence[Any]) -> Any:
        """Put values together, as what one process finds."""
