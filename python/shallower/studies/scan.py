"""A scan of a model into a folder, checked first; ``scanning/model.py`` resumes it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ScanError
from ..models.dtypes import STREAM
from ..models.source import ModelSource
from ..reporting.charts.heat_map import draw_heat_map
from ..scanning.builder import check_metrics
from ..scanning.scan import Scan, deciding
from ..scanning.settling import JUDGED
from ..settings.stages import ScanSettings
from ..settings.until import Settled
from ..storage import check_apart, check_free, check_room, claimed
from ..store.done import Output
from ..store.given_models import ModelStore
from ..store.inputs import inputs_of, job_of, model_content, texts_content
from ..store.store import Entry, Store
from ..texts.sources import Texts, place_of_texts
from ..values.estimates import MemoryPlan, Time
from ..values.files import HEAT_MAP_FILE, PARTIAL_FILE, SCAN_FILE, SMALL
from ..values.schema import read
from ..values.shard import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..memory.streaming import StreamPlan
    from ..models.offload import Reading


@dataclass(frozen=True, kw_only=True)
class ScanJob(ScanSettings):
    """A scan of a model by settings into a folder, which is checked when it is made."""

    source: ModelSource
    texts: Iterable[str]  # calibration texts; of a file the first one is read
    out: Path  # for ``scan.safetensors`` and, where it can be drawn, ``heat_map.png``
    overwrite: bool = False  # what is there, once the new is complete
    device_memory: str | None = None  # as ``16GB``; what is free by default
    store: Store = field(default_factory=lambda: Store(None))
    shard: Shard | None = None  # the part that is made alone, beside what is there
    known: Entry | None = field(init=False, default=None)  # of this very scan in this place
    found: list[str] = field(default_factory=list, init=False)  # when another command made it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metrics(self.metrics)
        check_apart(self.file, [self.source.place, place_of_texts(self.texts)])
        object.__setattr__(self, "known", None if self.shard else self._output.find())
        if self.known is None:
            self.source.check()
            if self.stops is not None:
                self.stops.check(deciding(self.metrics), self.positions)
                self.stops.of(self.source.count_layers())
            names = () if self.shard else (SCAN_FILE, HEAT_MAP_FILE)
            for name in names:  # the heat map is drawn before the scan is whole
                begun = name == HEAT_MAP_FILE and (self.out / PARTIAL_FILE).exists()
                check_free(self.out / name, self.overwrite or begun)
            check_room(self.file, self._num_bytes)
            if self.experts:
                self.source.count_experts()  # a ModelError refuses a model that has none
        if isinstance(self.texts, Texts):
            self.texts.check()

    @property
    def _num_bytes(self) -> int:
        """The bytes of the scan, with those of the samples that it keeps, of all texts."""
        states = self.source.count_layers() + 1 if self.keep_samples else 0
        values = length_hint(self.texts) * len(self.metrics) * states * (states - 1) // 2
        return SMALL + 8 * values * (self.positions.count or self.tokens.max_length)

    @property
    def file(self) -> Path:
        """The file of the scan."""
        return self.out / SCAN_FILE

    @cached_property
    def content(self) -> str | None:
        """A hash of the files of the model; None where they are not known."""
        return model_content(self.source, self.store)

    @cached_property
    def job(self) -> str | None:
        """A hash of all that the scan depends on but machine and places; None if not known."""
        texts = texts_content(self.texts, self.store) if self._are_read_again else None
        return job_of(self.source, self.content, texts and {**self._of, "texts": texts})

    @property
    def _are_read_again(self) -> bool:
        return isinstance(self.texts, Texts | list)

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the model, after its files were identified."""
        self.identify()
        return self.source.load()

    def identify(self) -> None:
        """Find out what the scan is of before it begins: files may change meanwhile."""
        self.content, self._inputs  # noqa: B018 - both are kept

    def describe(self, memory: MemoryPlan | None = None) -> dict[str, Any]:
        """Describe what would be done, by the config of the model and ``memory``, if it is planned.

        ModelError: the config does not say how many layers the model has.
        """
        from ..forecasts.forecast import memory_facts
        from ..forecasts.speed import or_unknown

        num_layers, plan = self.source.count_layers(), memory or self.memory(self.source)
        described = {
            "scan": str(self.source),
            "dtype": self.source.resolved().dtype,
            "texts": place_of_texts(self.texts) or "given",
            "positions": str(self.positions),
            **({"experts": self.experts} if self.experts else {}),
            **memory_facts(self.source, plan),
        }
        if self.device_memory is None:  # else it is of a card that is not here
            described["time"] = or_unknown(lambda: self._time(plan.micro_batch))
        if self.stops is not None:
            described["until"] = str(self.stops.of(num_layers))
        if self.source.device_map == STREAM:
            described["stream"] = or_unknown(self._planned)
        return {**described, "write": [str(self.file)]}

    def _planned(self) -> "StreamPlan":
        """What is read from disk, at most; raises what no plan can be made of."""
        from ..forecasts.work import count_texts, plan_passes

        length, count = self.tokens.max_length, count_texts(self.texts)
        texts = count if self.until is None else min(count, JUDGED)
        return plan_passes(
            self.source,
            [(-(-count // texts), texts * length)],
            num_compared=texts * min(length, self.positions.count or length),
        )

    def _time(self, texts: int) -> Time:
        """The seconds of so many texts a forward; raises what no forecast can be made of."""
        from ..forecasts.speed import Work
        from ..forecasts.work import Counted, forecast, lengths_of

        tokenizer = self.source.load_tokenizer()
        lengths = lengths_of(tokenizer, self.texts, self.tokens.max_length)
        times = self.source.count_layers() * (1 + self.experts)  # hooks run the experts again
        work = Work(float(lengths.sum()) * times)
        return forecast(Counted(self.source, work, texts, lengths.mean()))

    def reading(self, model: "PreTrainedModel") -> "Reading | None":
        """What was read of a model whose layers are streamed from disk; None of one in memory."""
        from ..models.offload import reading_of

        return reading_of(model) if self.source.is_streamed else None

    def memory(self, source: ModelSource, processes: int = 1) -> MemoryPlan:
        """Forecast what a forward takes; ``processes`` as :func:`memory_forecast`."""
        from ..forecasts.forecast import forecast_source

        return forecast_source(
            source,
            "scan",
            self.tokens,
            device_memory=self.device_memory,
            positions=self.positions,
            processes=processes,
            experts=self.experts,
        )

    @cached_property
    def _output(self) -> Output:
        """The scan and its heat map."""
        return Output(
            self.store, "scan", self.out, lambda: self._inputs, (SCAN_FILE, HEAT_MAP_FILE)
        )

    @cached_property
    def _inputs(self) -> dict[str, Any] | None:
        """All that the scan depends on, without the threads; None for texts that are read once."""
        if not self._are_read_again or self.content is None:
            return None
        models, texts = {"model": self.source}, {"texts": self.texts}
        return inputs_of(self.store, models, texts, **self._of)

    @property
    def _of(self) -> dict[str, Any]:
        return {**self.to_json(), "device_memory": self.device_memory}

    def reuse(self) -> tuple[Scan, list[Path]]:
        """Read the scan that is there already, and name its files."""
        scanned = Scan.load(self.out / SCAN_FILE)
        if self.known is not None:
            scanned.settled = read(Settled | None, self.known.value.get("settled"))
        return self._written(scanned)

    def _written(self, scanned: Scan) -> tuple[Scan, list[Path]]:
        """The scan and its files; the heat map is drawn where it is missing."""
        heat_map = self.out / HEAT_MAP_FILE
        there = self.known is not None and heat_map.is_file()
        drawn = [heat_map] if there else draw_heat_map(scanned, self.out)
        return scanned, [self.file, *drawn]

    def run(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
    ) -> tuple[Scan, list[Path]]:
        """Scan, going on from what an interrupted run of the same job left.

        Returns the scan, and the files that were written. Raises ScanError if what was left is of
        another job, and ``overwrite`` is off, and else as :func:`shallower.scan`.
        """
        with claimed(self.file, overwrite=True):
            return self.finish(self._scanned(model, tokenizer))

    def _scanned(self, model: Any, tokenizer: Any) -> Scan:
        partial = self.out / PARTIAL_FILE
        try:
            return self._scan(model, tokenizer, partial)
        except ScanError:
            if not self.overwrite:
                raise
            partial.unlink()
            return self._scan(model, tokenizer, partial)

    def finish(self, scanned: Scan) -> tuple[Scan, list[Path]]:
        """Write the scan and its heat map, and remember them; the scan and its files."""
        done = self._written(scanned)
        scanned.save(self.out / SCAN_FILE)  # the last file: without it all is made anew
        (self.out / PARTIAL_FILE).unlink(missing_ok=True)
        self._output.keep({"settled": scanned.settled and scanned.settled.to_json()})
        return done

    def _scan(self, model: Any, tokenizer: Any, checkpoint: Path) -> Scan:
        from ..models.decoder import Decoder
        from ..scanning.model import scan, stored_scan

        settings = ScanSettings(
            **{one.name: getattr(self, one.name) for one in fields(ScanSettings)}
        )
        if self.device_memory is not None:
            planned = self.memory(self.source.resolved())
            settings = replace(settings, batch_size=planned.micro_batch)
        decoder, texts = Decoder.of(model, self.content), self.texts
        how: Any = {"settings": settings, "checkpoint": checkpoint}
        if self._inputs is None or self.stops is not None:
            return scan(decoder, tokenizer, texts, **how)
        store = replace(ModelStore.of(self.source, self.store), found=self.found)
        return stored_scan(decoder, tokenizer, texts, store=store, **how)
