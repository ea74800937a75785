"""Shards of an evaluation, by hand or by workers: of the losses, not of tasks and speech."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ProcessesError, SettingsError, ShallowerError
from ..models.source import ModelSource
from ..storage import check_apart, claimed, write_file
from ..store.given_models import ModelStore
from ..store.inputs import machine
from ..store.store import Store
from ..studies.evaluate import EvalJob, KnownResults, Result, Results
from ..studies.measures import LossOfTexts, Measure, PerplexityOfText
from ..texts.sources import Texts, read_whole
from ..values.files import EVAL_FILE
from ..values.memory import MemoryPlan
from ..values.plan import Plan
from ..values.provenance import forward_versions
from ..values.shard import Shard
from ..values.tokens import Tokens
from .gather import write_evaluation
from .measured import Evaluation, MeasuredShard, Part, gather_evaluation
from .shards import (
    OpenedShards,
    SharedJob,
    SharedShards,
    absolute,
    check_workers,
    described_texts,
    described_workers,
    when_made,
)

if TYPE_CHECKING:
    from ..evaluation.batches import AllBatches
    from ..values.scores import Scores

OPENER = f"{__name__}:OpenedEval"
"""What a worker opens."""


class EvalShards:
    """A model that is loaded, of which any shard of an evaluation can be measured.

    ``content`` and ``mark`` are :attr:`EvalJob.content` and :attr:`EvalJob.job`, of whoever drives.
    Raises PlanError for a plan of another model, and what the measures raise.
    """

    def __init__(self, job: EvalJob, loaded: Any, *, content: str | None, mark: str | None) -> None:
        from ..judgement.judges.judge import LossJudge
        from ..judgement.trials import trials_journal
        from ..models.decoder import Decoder

        model, tokenizer = loaded
        self._decoder, self._plan = Decoder.of(model, content), job.plan
        if self._plan:
            self._plan.check_model(self._decoder.identity)
        self._mark, self._described = mark, described_job(job)
        self._all = {
            one.kind: _batches(one, tokenizer, tokens=job.fitted(one)) for one in job.measures
        }
        self._judges = {kind: LossJudge(one.numbered) for kind, one in self._all.items()}
        store = ModelStore.of(job.source, job.store)
        self._journals = {
            one.kind: trials_journal(self._judges[one.kind], store=store, items=one.items)
            for one in job.measures
        }

    @property
    def common(self) -> dict[str, object]:
        """What is the same wherever the same evaluation is opened, by the words of an error."""
        model = self._decoder.identity
        return {
            "dtype": model.dtype,
            "model": model.fingerprint,
            "weights": self._decoder.content,
            "texts": {kind: one.fingerprint for kind, one in self._all.items()},
            "number of batches": {kind: len(one.batches) for kind, one in self._all.items()},
        }

    def texts_of(self, shard: Shard) -> dict[str, list[int]]:
        """The first text, or window, of a shard and the one behind the last, by measure."""
        found = {}
        for kind, one in self._all.items():
            indices = one.indices(shard.of(len(one.batches)))
            found[kind] = [indices[0], indices[-1] + 1] if indices else [0, 0]
        return found

    def measure(self, shard: Shard, *, progress: bool | None = None) -> MeasuredShard:
        """Measure one shard, of the model and of its cut."""
        from ..cutting.in_model import without_layers

        found = {"base": self._scores(shard, None, progress)}
        if self._plan:
            with without_layers(self._decoder.model, self._plan):
                found["cut"] = self._scores(shard, self._plan, progress)
        parts = {
            kind: self._part(kind, shard, {side: one[kind] for side, one in found.items()})
            for kind in self._all
        }
        return MeasuredShard(
            shard,
            self._mark,
            forward_versions(),
            machine=machine(),
            described=self._described,
            model=self._decoder.identity,
            weights=self._decoder.content,
            plan=self._plan,
            parts=parts,
        )

    def _scores(
        self, shard: Shard, plan: Plan | None, progress: bool | None
    ) -> "dict[str, tuple[Scores, int]]":
        """The scores of a shard by measure, each with the size of the vocabulary."""
        from ..judgement.forwards import scores_by_forwards

        cut = f"without {plan.words}, " if plan else ""
        return {
            kind: scores_by_forwards(
                self._decoder,
                judge,
                plan,
                looks=shard.of(len(judge.batches)),
                journal=self._journals[kind],
                name=f"{kind} {cut}shard {shard}",
                progress=progress,
            )
            for kind, judge in self._judges.items()
        }

    def _part(self, kind: str, shard: Shard, sides: "Mapping[str, tuple[Scores, int]]") -> Part:
        every, judge = self._all[kind], self._judges[kind]
        looks = shard.of(len(judge.batches))
        numbers = sorted(number for look in looks for number in judge.items[look].tolist())
        items, sizes = every.indices(looks), every.num_bytes
        (_, vocab_size), *_ = sides.values()
        return Part(
            num_batches=len(every.batches),
            batch_size=every.batch_size,
            num_items=every.num_items,
            fingerprint=every.fingerprint,
            settings={**every.settings, **({"vocab_size": vocab_size} if kind == "loss" else {})},
            items=tuple(items),
            counts=tuple(map(int, judge.weights[numbers])),
            num_bytes=None if sizes is None else tuple(sizes[item] for item in items),
            nats={side: scores.sums[numbers] for side, (scores, _) in sides.items()},
        )


def _batches(measure: Measure[Any], tokenizer: Any, *, tokens: Tokens) -> "AllBatches":
    """All batches of a measure that falls into shards."""
    from ..evaluation.batches import batches_of_texts, batches_of_windows

    if isinstance(measure, LossOfTexts):
        return batches_of_texts(tokenizer, measure.texts, tokens)
    assert isinstance(measure, PerplexityOfText)
    return batches_of_windows(tokenizer, measure.text, tokens, bos=measure.bos)


def _check_measures(job: EvalJob) -> None:
    """Refuse tasks and speech, whose items do not fall into shards."""
    whole = {
        "tasks": ("are scored", "share them by naming one task a command"),
        "speech": ("is measured", "measure it apart"),
    }
    for one in job.measures:
        if one.kind in whole:
            done, way_out = whole[one.kind]
            raise SettingsError(
                f"--{one.kind} {done} by one process: leave out --shard, --workers and --on, and "
                f"{way_out}"
            )


@dataclass(frozen=True, kw_only=True)
class EvalShardJob(EvalJob):
    """One shard of an evaluation, into a file of its own.

    Attributes:
        shard: which part of all batches.
    """

    shard: Shard

    def __post_init__(self) -> None:
        _check_measures(self)
        if self.out is None:
            raise SettingsError("a shard is a file: name the folder to write it to (--out)")
        super().__post_init__()

    @property
    def file(self) -> Path:
        """The file of the shard."""
        assert self.out is not None
        return self.out / self.shard.file_of("eval")

    @cached_property
    def made(self) -> str | None:
        """When the shard was measured, if that very shard is there.

        OutputError: something else is there, and not to be replaced.
        """
        place, load, overwrite = self.file, MeasuredShard.load, self.overwrite
        return when_made(place, self.shard, lambda: self.job, load=load, overwrite=overwrite)

    def check_place(self) -> None:
        """Refuse what is there, unless it is that very shard: OutputError."""
        _ = self.made

    def run_shard(self) -> None:
        """Measure the shard into its file; OutputError if another one is there."""
        content, mark = self.content, self.job  # of the files that are loaded then
        with claimed(self.file, self.overwrite):
            shards = EvalShards(self, self.source.load(), content=content, mark=mark)
            write_file(self.file, shards.measure(self.shard).to_bytes())


@dataclass(frozen=True, kw_only=True)
class SharedEvalJob(SharedJob, EvalJob):
    """An evaluation that workers share."""

    def __post_init__(self) -> None:
        _check_measures(self)
        check_workers(self.workers, self.on, "eval", self.source)
        for measure in self.measures:
            _described(measure)
        super().__post_init__()

    def describe(
        self, memory: MemoryPlan | None = None, others: Sequence[EvalJob] = ()
    ) -> dict[str, Any]:
        """Describe what the evaluation would take, and what each worker would get."""
        plan = memory or self.memory(self.source, processes=2)
        shared = described_workers(self.source, self.workers, on=self.on, plan=plan)
        return {**super().describe(plan, others), **shared}

    def run_shared(self) -> Results:
        """Let workers measure, each with a model of its own, and put their shards together.

        Shards that an interrupted evaluation left in the folder are not measured again. The
        results have the bits that one process finds with as many threads as a worker has.
        ProcessesError: there are no workers, or shards failed too often; the others stay for the
        same command, where there is a folder.
        """
        with self._folder() as out:
            shared = self.shared(out)
            shared.make()
            found = gather_evaluation(shared.files)
            for place in shared.files:
                place.unlink()
        _keep(found, self)
        return results_of(found)

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        if self.out is None:
            with tempfile.TemporaryDirectory(prefix="shallower-eval-") as folder:
                yield Path(folder)
        else:
            with claimed(self.out / EVAL_FILE, overwrite=True):
                yield self.out

    def shared(self, out: Path) -> SharedShards:
        """The evaluation as workers receive it: names, hashes and options, no weights or texts."""
        return self.shards_of(
            "eval",
            out,
            opener=OPENER,
            load=MeasuredShard.load,
            options=described_job(self),
            expects={_NAMES[one.kind]: one.inputs(self.store) for one in self.measures},
            is_kept=self.out is not None,
        )


_NAMES = {"loss": "texts", "perplexity": "text"}
"""What a measure is of, by its kind."""


def described_job(job: EvalJob) -> dict[str, Any]:
    """An evaluation as another process makes it again; ProcessesError where texts were given."""
    return {
        "source": {**asdict(job.source), "path": absolute(str(job.source.path))},
        "measures": {one.kind: _described(one) for one in job.measures},
        "plan": job.plan and job.plan.to_json(),
        "device_memory": job.device_memory,
    }


def _job_of(described: Mapping[str, Any], store: Store) -> EvalJob:
    """The evaluation that :func:`described_job` described."""
    return EvalJob(
        source=ModelSource(**described["source"]),
        measures=[_measure_of(kind, one) for kind, one in described["measures"].items()],
        layers=described["plan"] and Plan.from_json(described["plan"]),
        device_memory=described["device_memory"],
        store=store,
    )


def _described(measure: Measure[Any]) -> dict[str, Any]:
    """A measure as a worker makes it; ProcessesError where its texts were given."""
    if isinstance(measure, LossOfTexts):
        return {**described_texts(measure.texts), "tokens": asdict(measure.tokens)}
    assert isinstance(measure, PerplexityOfText)
    if measure.source is None:
        raise ProcessesError("workers read a text themselves: name its file")
    options = {"context": measure.context, "bos": measure.bos, "batch_size": measure.batch_size}
    return {"source": absolute(measure.source), **options}


def _measure_of(kind: str, described: Mapping[str, Any]) -> Measure[Any]:
    """The measure that :func:`_described` described."""
    options = dict(described)
    if kind == "loss":
        tokens = Tokens(**options.pop("tokens"))
        return LossOfTexts(Texts(**options), tokens)
    return PerplexityOfText(read_whole(options["source"]), **options)


class OpenedEval(OpenedShards):
    """An evaluation that a worker has opened."""

    def open(self, source: ModelSource, described: Mapping[str, Any]) -> EvalShards:
        """Check the texts, and load the model."""
        job = _job_of(described, self.store)
        for one in job.measures:
            place = described["measures"][one.kind]["source"]
            self.check(_NAMES[one.kind], place, partial(one.inputs, self.store))
        loaded, mark = source.load(progress=False), described["job"]
        self._shards = EvalShards(job, loaded, content=self.content, mark=mark)
        return self._shards

    def run(self, unit: str) -> bytes:
        """Measure one shard."""
        return self._shards.measure(Shard.parse(unit), progress=False).to_bytes()


def results_of(found: Evaluation) -> Results:
    """The results of shards, as those of one process."""
    return {
        kind: {side: Result(value, found.model) for side, value in sides.items()}
        for kind, sides in found.values.items()
    }


def gather_eval_into(
    parts: Iterable[Path], out: Path, *, store: Store, overwrite: bool = False
) -> tuple[Evaluation, bool]:
    """Put shards of an evaluation together, and write what was found; the shards stay.

    It is remembered where model and texts lie here as the shards say. Returns it, and whether it
    is. Raises ScanError as :func:`gather_evaluation`, and OutputError.
    """
    parts = list(parts)
    check_apart(out / EVAL_FILE, [str(part) for part in parts if not part.is_dir()])
    found = gather_evaluation(parts)
    dtype = found.model.dtype
    write_evaluation(out, found.values, dtype, plan=found.plan, overwrite=overwrite)
    try:
        if found.described["source"]["trust_remote_code"]:  # by the word of a file
            return found, False
        return found, _keep(found, _job_of(found.described, store))
    except (ShallowerError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return found, False  # it describes nothing that is here


def _keep(found: Evaluation, job: EvalJob) -> bool:
    """Remember what shards found, if they are of this very job, as what one process measured."""
    if None in (found.machine, job.job, *job.inputs.values()) or found.job != job.job:
        return False
    for measure in job.measures:
        inputs: Any = job.inputs[measure.kind]
        of = {**inputs, "model": {**inputs["model"], "machine": found.machine}}
        known = KnownResults(job.store, measure, of)
        for side, value in found.values[measure.kind].items():
            known.keep(job.sides[side], value, found.model)
    return True
