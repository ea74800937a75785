"""A scan of a model into a folder: checked before anything is loaded, and resumed."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, ScanError, StatesError
from ..models.dtypes import STREAM
from ..models.source import ModelSource
from ..reporting.charts.heat_map import HEAT_MAP_FILE, draw_heat_map
from ..scanning.builder import check_metrics
from ..scanning.scan import Scan, deciding
from ..scanning.states_file import Origin, StatesFile
from ..scanning.states_writer import check_keepable
from ..storage import check_apart, check_free, claimed, free_bytes
from ..texts.sources import Texts, place_of_texts
from ..values.files import PARTIAL_FILE, SCAN_FILE
from ..values.hashing import hash_of
from ..values.memory import MemoryPlan
from ..values.positions import Positions
from ..values.schema import read
from ..values.tokens import DEFAULT_BATCH, Tokens
from ..values.until import Settled, Until
from .done import Known, Output
from .inputs import inputs_of
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..memory.streaming import StreamPlan
    from ..models.offload import Reading


@dataclass(frozen=True, kw_only=True)
class ScanJob:
    """A scan of a model into a folder, which is checked when it is made.

    Attributes:
        source: the model.
        texts: calibration texts; of a file the first one is read.
        out: the folder for ``scan.safetensors`` and, where it can be drawn, ``heat_map.png``.
        tokens: how texts become batches.
        metrics: metrics to measure.
        positions: the tokens of every text that are compared.
        threads: threads of the Rust core, all by default.
        keep_samples: keep the values of single samples.
        keep_states: a ``.safetensors`` file for the states, if they are to be kept.
        until: stop as soon as the best blocks are as sure as it says.
        experts: also gather statistics of routed experts.
        overwrite: replace what is there, once the new is complete.
        device_memory: the memory that may be used, as ``16GB``; what is free by default.
        store: what is remembered of earlier scans.
        known: of this very scan in this place, if it was made before.

    Raises:
        OutputError: a place is taken, or is not one to write to.
        MetricError, TextsError, PositionsError, LayersError: an option that no scan has.
        ModelError: experts are asked for, and the model's config counts none.
    """

    source: ModelSource
    texts: Iterable[str]
    out: Path
    tokens: Tokens = field(default_factory=Tokens)
    metrics: Sequence[str] = ("angular", "cosine")
    positions: Positions = field(default_factory=Positions)
    threads: int | None = None
    keep_samples: bool = False
    keep_states: Path | None = None
    until: Until | None = None
    experts: bool = False
    overwrite: bool = False
    device_memory: str | None = None
    store: Store = field(default_factory=lambda: Store(None))
    known: Known | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_metrics(self.metrics)
        for place in self.places:
            check_apart(place, [self.source.place, place_of_texts(self.texts)])
        object.__setattr__(self, "known", self._look_up())
        if self.known is None:
            self._check_until()
            self._check_places()
            if self.experts:
                self.source.count_experts()  # a ModelError refuses a model that has none
        if isinstance(self.texts, Texts):
            self.texts.check()

    def _check_until(self) -> None:
        if self.until is not None:
            self.until.check(deciding(self.metrics), self.positions)
            self.until.of(self.source.count_layers())

    def _check_places(self) -> None:
        check_free(self.file, self.overwrite)
        if self.keep_states is not None and self._kept is None:
            check_keepable(self.keep_states, overwrite=self.overwrite)
            for name in (SCAN_FILE, PARTIAL_FILE):
                if self.keep_states.absolute() == (self.out / name).absolute():
                    raise OutputError(
                        f"{self.keep_states} is the scan itself: keep the states elsewhere"
                    )

    @cached_property
    def _kept(self) -> Origin | None:
        """Of the states of this scan, where it was killed between them and its own file."""
        if self.keep_states is None or self.overwrite:
            return None
        try:
            before = Scan.load(self.out / PARTIAL_FILE)
            with StatesFile(self.keep_states) as file:
                kept = file.origin
        except (ScanError, StatesError):
            return None
        of_both = [(one.model, one.texts, one.positions) for one in (kept, before)]
        return kept if of_both[0] == of_both[1] else None

    @property
    def places(self) -> list[Path]:
        """The files that the job leaves."""
        return [path for path in (self.file, self.keep_states) if path]

    @property
    def file(self) -> Path:
        """The file of the scan."""
        return self.out / SCAN_FILE

    @cached_property
    def job(self) -> str | None:
        """A hash of all that the scan depends on; None where that is not known."""
        return None if self._inputs is None else hash_of(self._inputs)

    def describe(self) -> dict[str, Any]:
        """Describe what would be done, by the config of the model alone.

        Where states are kept, ``states_bytes_per_token``, ``states_bytes_at_most`` of all texts,
        and ``free_bytes`` at the place of their file; None where that is not known.
        """
        num_states, width = self.source.states_shape()
        dtype = self.source.resolved().dtype
        described = {
            "scan": str(self.source),
            "dtype": dtype,
            "texts": place_of_texts(self.texts) or "given",
            "positions": str(self.positions),
            **({"experts": self.experts} if self.experts else {}),
            "memory": self.memory(self.source),
        }
        if self.until is not None:
            described["until"] = str(self.until.of(num_states - 1))
        if self.source.device_map == STREAM:
            described["stream"] = self._planned()
        if self.keep_states is not None:
            size = 4 if dtype == "float32" else 2
            each = width and num_states * width * size
            described.update(self._room(each))
        return {**described, "write": [str(path) for path in self.places]}

    def _planned(self) -> "StreamPlan | str":
        """What is read from disk, at most; a sentence where that cannot be told."""
        import torch

        from ..memory.streaming import plan_stream

        files = self.source.weight_files
        count = self.texts.count() if isinstance(self.texts, Texts) else length_hint(self.texts)
        if not files or not count:
            return "cannot be told before: the weights, or the number of texts, are not known here"
        return plan_stream(
            self.source.read_config(),
            files,
            getattr(torch, self.source.resolved().dtype),
            num_tokens=count * self.tokens.max_length,
        )

    def reading(self, model: "PreTrainedModel") -> "Reading | None":
        """What was read of a model whose layers wait on disk; None of one in memory."""
        from ..models.offload import reading_of

        return reading_of(model) if self.source.device_map == STREAM else None

    def memory(self, source: ModelSource) -> MemoryPlan:
        """Forecast what a forward takes."""
        from .forecast import forecast_source

        return forecast_source(
            source,
            "scan",
            self.tokens,
            device_memory=self.device_memory,
            positions=self.positions,
        )

    def _room(self, bytes_per_token: int | None) -> dict[str, Any]:
        assert self.keep_states is not None
        most = min(self.tokens.max_length, self.positions.count or self.tokens.max_length)
        count = self.texts.count() if isinstance(self.texts, Texts) else length_hint(self.texts)
        return {
            "states_bytes_per_token": bytes_per_token,
            "states_bytes_at_most": bytes_per_token and count and bytes_per_token * most * count,
            "free_bytes": free_bytes(self.keep_states),
        }

    @cached_property
    def _outputs(self) -> list[Output]:
        """The scan and its heat map, and the states that are kept."""
        names = (SCAN_FILE, HEAT_MAP_FILE)
        found = [Output(self.store, "scan", self.out, lambda: self._inputs, names)]
        if self.keep_states is not None:
            found.append(Output(self.store, "states", self.keep_states, lambda: self._inputs))
        return found

    @cached_property
    def _inputs(self) -> dict[str, Any] | None:
        """All that the scan depends on, without the threads; None for texts that are read once."""
        if not isinstance(self.texts, Texts | list):
            return None
        return inputs_of(
            self.store,
            {"model": self.source},
            {"texts": self.texts},
            tokens=asdict(self.tokens),
            metrics=list(self.metrics),
            positions=asdict(self.positions),
            keep_samples=self.keep_samples,
            until=None if self.until is None else asdict(self.until),
            device_memory=self.device_memory,
            **({"experts": self.experts} if self.experts else {}),
        )

    def _look_up(self) -> Known | None:
        found = [output.find() for output in self._outputs]
        return None if None in found else found[0]

    def reuse(self) -> tuple[Scan, list[Path]]:
        """Read the scan that is there already, and name its files."""
        scanned = Scan.load(self.out / SCAN_FILE)
        if self.known is not None:
            scanned.settled = read(Settled | None, self.known.value.get("settled"))
        return self._written(scanned)

    def _written(self, scanned: Scan) -> tuple[Scan, list[Path]]:
        """The scan and its files; the heat map is drawn where it is missing."""
        first, *others = self.places
        heat_map = self.out / HEAT_MAP_FILE
        there = self.known is not None and heat_map.is_file()
        drawn = [heat_map] if there else draw_heat_map(scanned, self.out)
        return scanned, [first, *drawn, *others]

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
            scanned = self._scan(model, tokenizer, partial)
        except ScanError:
            if not self.overwrite:
                raise
            partial.unlink()
            scanned = self._scan(model, tokenizer, partial)
        if self._kept is not None and self._kept.texts != scanned.texts:
            raise OutputError(
                f"{self.keep_states} exists already, and has the states of fewer texts: choose "
                f"another place, or replace it (overwrite=True, --overwrite)"
            )
        return scanned

    def finish(self, scanned: Scan) -> tuple[Scan, list[Path]]:
        """Write the scan and its heat map, and remember them; the scan and its files."""
        done = self._written(scanned)
        scanned.save(self.out / SCAN_FILE)  # the last file: without it all is made anew
        (self.out / PARTIAL_FILE).unlink(missing_ok=True)
        for output in self._outputs:
            output.keep({"settled": scanned.settled and scanned.settled.to_json()})
        return done

    def _scan(self, model: Any, tokenizer: Any, checkpoint: Path) -> Scan:
        from ..scanning.model import scan

        batch_size = self.tokens.batch_size
        if self.device_memory is not None:
            batch_size = self.memory(self.source.resolved()).micro_batch
            if self.until is not None:
                batch_size = min(batch_size, DEFAULT_BATCH)
        return scan(
            model,
            tokenizer,
            self.texts,
            max_length=self.tokens.max_length,
            batch_size=batch_size,
            metrics=self.metrics,
            threads=self.threads,
            checkpoint=checkpoint,
            keep_samples=self.keep_samples,
            positions=self.positions,
            keep_states=None if self._kept else self.keep_states,
            overwrite=self.overwrite,
            until=self.until,
            experts=self.experts,
        )
