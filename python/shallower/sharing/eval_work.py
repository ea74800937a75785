"""An evaluation that is shared, in parts of its batches: of losses, not of tasks and speech."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ScanError, ShallowerError, why
from ..models.source import ModelSource
from ..reporting.results import write_evaluation
from ..results.loss import Loss
from ..results.perplexity import Perplexity
from ..results.scores import Scores
from ..settings.stages import EvalSettings
from ..store import inputs
from ..store.given_models import ModelStore
from ..store.store import Store, open_store
from ..studies.evaluate import EvalJob, Result, Results, measures_of, values_and_dtype
from ..values.files import EVAL_FILE
from ..values.identity import ModelIdentity
from ..values.plan import Plan
from ..values.schema import plain_fields, read
from ..values.shard import Shard
from .shards import DAMAGES, MadeShard, values_of
from .work import Batches, Opened, agree, opened_source, progress_of, texts_of

SIDES = ("base", "cut")
"""The whole model, and that without layers."""

LEAST = {
    "loss": {"num_rejected": 0, "vocab_size": 2},
    "perplexity": {"bos": 0, "context": 2, "num_rest": 0},
}
"""What a part says of a measure beside its losses, and the least that it can be."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a part has of one measure."""

    num_items: int  # texts, or windows, in all
    settings: Mapping[str, int]  # of a result beside its losses, by the names of ``LEAST``
    items: tuple[int, ...]  # (S,) the indices of the part's texts among all, ascending
    counts: tuple[int, ...]  # (S,) the predicted tokens of each
    num_bytes: tuple[int, ...] | None  # (S,) the bytes of what is predicted, where counted
    nats: Mapping[str, NDArray[np.float64]]  # (S,) the summed losses of each, by side

    def __post_init__(self) -> None:
        of_each = [self.counts, *self.nats.values()]
        of_each += [] if self.num_bytes is None else [self.num_bytes]
        if any(len(one) != len(self.items) for one in of_each):
            raise ValueError(f"it has not a value for each of {len(self.items)} texts")
        if [*self.items] != sorted({*self.items}) or min(self.counts, default=1) < 1:
            raise ValueError("its texts do not ascend, or have no tokens")
        if self.num_items < 1:
            raise ValueError("it is of no texts")
        if not all(np.isfinite(one).all() for one in self.nats.values()):
            raise ValueError("a loss is not finite")


@dataclass(frozen=True, slots=True)
class MeasuredPart:
    """What a unit of an evaluation found."""

    machine: Mapping[str, Any]  # on which the last bits depend
    model: ModelIdentity  # the whole one
    tallies: Mapping[str, Tally]  # by the measure, ``loss`` or ``perplexity``

    def __post_init__(self) -> None:
        for kind, part in self.tallies.items():
            least, found = LEAST[kind], part.settings
            if {*found} != {*least} or any(found[one] < value for one, value in least.items()):
                raise ValueError(f"{kind}: it says {dict(found)}: expected at least {least}")
        if len({(*part.nats,) for part in self.tallies.values()} & {SIDES, SIDES[:1]}) != 1:
            raise ValueError("it has no measure, or not one of the same sides")

    @property
    def measured(self) -> dict[str, Any]:
        """What all parts have alike of each measure."""
        return {
            kind: (part.num_items, part.settings, {*part.nats}, part.num_bytes is None)
            for kind, part in self.tallies.items()
        }


def evaluation_of(parts: Sequence[MeasuredPart]) -> Results:
    """Put the parts of an evaluation together, to the bits of one process."""
    first, results = parts[0], {}
    if any(one.measured != first.measured for one in parts):
        raise ScanError("the shards are of different measures or cuts: measure them again")
    for kind, part in first.tallies.items():
        of_kind = [one.tallies[kind] for one in parts]
        items = [item for one in of_kind for item in one.items]
        if len(items) != part.num_items or len({*items}) != len(items):
            raise ScanError(
                f"the shards have {len(items):,} losses of {part.num_items:,}, or one twice: "
                f"measure them again"
            )
        counts = _in_order(items, [one.counts for one in of_kind])
        sizes = [one.num_bytes for one in of_kind if one.num_bytes is not None]
        num_bytes = _in_order(items, sizes) if sizes else None
        results[kind] = {
            side: Result(
                _value(part, Scores(_in_order(items, nats), counts), num_bytes), first.model
            )
            for side in part.nats
            if (nats := [one.nats[side] for one in of_kind])
        }
    return results


def machine_of(parts: Sequence[MeasuredPart]) -> Mapping[str, Any] | None:
    """The machine that measured; None for several that differ."""
    first = parts[0].machine
    return first if all(one.machine == first for one in parts) else None


def _in_order(items: Sequence[int], found: Sequence[Any]) -> NDArray[np.float64]:
    """(S,) the values of all shards, in the order of their texts."""
    return np.concatenate(found)[np.argsort(items)].astype(np.float64)


def _value(part: Tally, scores: Scores, num_bytes: NDArray[np.float64] | None) -> Loss | Perplexity:
    """The result of one side, of the scores of all texts or windows."""
    of = part.settings
    if "context" in of:
        return Perplexity(of["context"], bool(of["bos"]), of["num_rest"], scores)
    return Loss.of_scores(scores, num_bytes, **of)


def open_eval(described: Mapping[str, Any], folder: Path | None, job: Any) -> Opened:
    """Check the texts, and load the model: PlanError for a plan of another one."""
    source, store, expects = opened_source(described, job)
    of = job or _job_of(described, store)
    for one in of.measures:
        agree(expects.get(one.kind), one.source, partial(one.inputs, store))
    content, progress = described["expects"]["model"], progress_of(folder)
    parts = EvalParts(of, source, content, store=store, progress=progress)
    return Opened(described, parts.value, parts.common, texts_of(parts, described))


class EvalParts:
    """A model that is loaded, and all batches of an evaluation, of which any can be measured."""

    def __init__(
        self,
        job: EvalJob,
        source: ModelSource,
        content: str | None,
        *,
        store: Store,
        progress: bool | None,
    ) -> None:
        from ..models.decoder import Decoder

        model, tokenizer = source.load(progress=progress)
        self._decoder, self._sides = Decoder.of(model, content), job.sides
        if job.plan:
            job.plan.check_model(self._decoder.identity)
        measures: Any = job.measures  # those whose items fall into batches
        self._all = {one.kind: one.batches(tokenizer, job.fitted(one)) for one in measures}
        self._kept, self._progress = ModelStore.of(source, store), progress

    @property
    def common(self) -> dict[str, Any]:
        """What is the same wherever the same evaluation is opened, by the words of an error."""
        model, every = self._decoder.identity, self._all
        cut = self._sides.get("cut")
        gone = [] if cut is None else [cut.words, cut.experts]
        return {
            "dtype": model.dtype,
            "model": str(replace(model, name="the model")),
            "weights": str(self._decoder.content)[:12],
            "cut": ", ".join(str(one) for one in gone if one) or "none",
            "measures": {kind: f"batches of {one.batch_size}" for kind, one in every.items()},
            "texts": {kind: f"{one.num_items}, {one.fingerprint}" for kind, one in every.items()},
            "number of batches": {kind: len(one.batches) for kind, one in every.items()},
        }

    def texts_of(self, shard: Shard) -> dict[str, list[int]]:
        """The first text, or window, of a shard and the one behind the last, by measure."""
        found = {}
        for kind, one in self._all.items():
            indices = one.indices(shard.of(len(one.batches)))
            found[kind] = [indices[0], indices[-1] + 1] if indices else [0, 0]
        return found

    def value(self, unit: str) -> dict[str, Any]:
        """Measure one part, of the model and of its cut."""
        shard = Shard.parse(unit)
        tallies = {kind: self._part(kind, shard) for kind in self._all}
        return plain_fields(MeasuredPart(inputs.machine(), self._decoder.identity, tallies))

    def _part(self, kind: str, shard: Shard) -> Tally:
        """What a part has of one measure."""
        every, nats = self._all[kind], {}
        looks = shard.of(len(every.batches))
        numbers = sorted(number for look in looks for number in every.numbered[look].samples)
        for side, plan in self._sides.items():
            scores, vocab_size = self._scores(kind, shard, plan)
            nats[side] = scores.sums[numbers]
        items, sizes = every.indices(looks), every.num_bytes
        return Tally(
            num_items=every.num_items,
            settings={**every.settings, **({"vocab_size": vocab_size} if kind == "loss" else {})},
            items=tuple(items),
            counts=tuple(map(int, every.weights[numbers])),
            num_bytes=None if sizes is None else tuple(sizes[item] for item in items),
            nats=nats,
        )

    def _scores(self, kind: str, shard: Shard, plan: Plan | None) -> tuple[Scores, int]:
        """The scores of a shard without what a plan drops, and the size of the vocabulary."""
        from ..cutting.in_model import without_layers
        from ..evaluation.loss import scores_of

        every, cut = self._all[kind], f"without {plan.words}, " if plan else ""
        with without_layers(self._decoder.model, plan) if plan else nullcontext():
            return scores_of(
                self._decoder,
                every,
                plan,
                looks=shard.of(len(every.batches)),
                store=self._kept,
                name=f"{kind} {cut}shard {shard}",
                progress=self._progress,
            )


class EvalWork(Batches):
    """An evaluation."""

    kind, results, opens = "eval", EVAL_FILE, staticmethod(open_eval)

    def prepare(self) -> None:
        """Refuse tasks, speech, whose items do not fall into shards, and texts that were given."""
        super().prepare()
        self.reads = [self.job.source.place, *(one.source for one in self.job.measures)]
        for one in self.job.measures:
            one.described()

    def described(self) -> dict[str, Any]:
        """Describe the evaluation: what is measured of which cut."""
        job, found = self.job, super().described()
        found["expects"] |= {one.kind: one.inputs(job.store) for one in job.measures}
        return {
            **found,
            "settings": {k: v for one in job.measures for k, v in one.described().items()},
            "plan": job.plan and job.plan.to_json(),
            "device_memory": job.device_memory,
        }

    def joined(self, values: Sequence[Any]) -> Results:
        """Put parts together, and remember what they found."""
        parts = [read(MeasuredPart, value) for value in values]
        found = evaluation_of(parts)
        _keep(found, machine_of(parts), self.job, self.job.job)
        return found

    @classmethod
    def gather(
        cls, shards: Sequence[MadeShard], out: Path, *, overwrite: bool, **_: bool
    ) -> tuple[Results, Plan | None, bool]:
        """Put shards together, and write what was found.

        It is remembered where model and texts lie here as the shards say. Returns it, the plan of
        the cut, and whether it is.
        """
        parts, described = values_of(shards, MeasuredPart), shards[0].described
        found = evaluation_of(parts)
        try:
            plan = described["plan"] and Plan.from_json(described["plan"])
        except DAMAGES as error:
            raise ScanError(f"shard {shards[0].shard} is damaged: {why(error)}") from error
        values, dtype = values_and_dtype(found)
        write_evaluation(out, values, dtype, plan=plan, overwrite=overwrite)
        try:
            if described["source"]["trust_remote_code"]:  # by the word of a file
                return found, plan, False
            job = _job_of(described, open_store())
            return found, plan, _keep(found, machine_of(parts), job, shards[0].job)
        except (ShallowerError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return found, plan, False  # it describes nothing that is here


def _job_of(described: Mapping[str, Any], store: Store) -> EvalJob:
    """The evaluation that was described."""
    return EvalJob(
        source=ModelSource(**described["source"]),
        measures=measures_of(EvalSettings(**described["settings"]), is_shared=True),
        layers=described["plan"] and Plan.from_json(described["plan"]),
        device_memory=described["device_memory"],
        store=store,
    )


def _keep(
    found: Results, machine: Mapping[str, Any] | None, job: EvalJob, measured: str | None
) -> bool:
    """Remember what was found, if it is of this very job, as what one process measured."""
    keys, kept = job.keys, job.kept
    if None in (machine, kept.model, job.job, *keys.values()) or measured != job.job:
        return False
    kept = replace(kept, model={**(kept.model or {}), "machine": machine})
    for measure in job.measures:
        for side, one in found[measure.kind].items():
            of: Any = {"plan": job.sides[side], "model": one.model}
            measure.keep(kept, keys[measure.kind], one.value, **of)
    return True
