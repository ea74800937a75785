"""What a model is measured by before and after a cut (loss, perplexity, tasks), each once."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..cutting.plans import agreed_plan
from ..errors import CacheError, TextsError
from ..evaluation.task_files import files_of
from ..models.source import ModelSource
from ..storage import check_apart
from ..texts.sources import Texts
from ..values.files import EVAL_FILE
from ..values.hashing import hash_of
from ..values.identity import ModelIdentity
from ..values.layers import Block, ranges
from ..values.loss import Loss
from ..values.memory import MemoryPlan
from ..values.perplexity import Perplexity
from ..values.plan import Plan
from ..values.schema import read
from ..values.task_scores import TaskScores
from ..values.tokens import BatchSize, Tokens
from .inputs import hash_of_files, inputs_of, texts_inputs
from .store import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import ChosenTasks
    from ..models.decoder import Decoder

T = TypeVar("T")

PROMPT_TOKENS = 2048
"""Tokens of a task's prompt that memory is planned for."""


class Measure(ABC, Generic[T]):
    """A measure of a model, whose results are kept.

    Attributes:
        kind: its name, also that of the entries in the store.
        tokens: how texts become batches.
        source: the file that is read, if it is one and known.
    """

    kind: str
    tokens: Tokens
    source: str | None = None

    @abstractmethod
    def inputs(self, store: Store) -> Mapping[str, Any] | None:
        """Name all that it depends on beside the model; None where that is not known."""

    def prepare(self) -> None:
        """Find out what is wrong with it before a model is loaded."""

    def token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> "Iterator[NDArray[np.int64]]":
        """Yield the token ids of every text or window, which results are paired by; of tasks none,
        whose items are not known by their tokens.
        """
        yield from ()

    @abstractmethod
    def measure(
        self, decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase", *, tokens: Tokens, name: str
    ) -> T:
        """Measure a model; ``name`` is that of the bar."""

    @abstractmethod
    def record(self, value: T) -> dict[str, Any]:
        """Give a result as plain JSON values."""

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> T:
        """Read a result; raises KeyError, TypeError, ValueError."""


@dataclass
class LossOfTexts(Measure[Loss]):
    """The next-token loss on texts.

    Attributes:
        texts: held-out texts, which can be read again.
        tokens: how they become batches.
    """

    texts: Texts | list[str]
    tokens: Tokens = field(default_factory=Tokens)
    kind = "loss"

    def inputs(self, store: Store) -> Mapping[str, Any] | None:
        """Identify the texts by their content."""
        texts = texts_inputs(self.texts, store)
        return texts and {"texts": texts, "tokens": asdict(self.tokens)}

    def token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> "Iterator[NDArray[np.int64]]":
        """Yield the token ids of every text."""
        from ..texts.batches import tokenise

        yield from (one.ids for one in tokenise(tokenizer, self.texts, self.tokens.max_length))

    def measure(
        self, decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase", *, tokens: Tokens, name: str
    ) -> Loss:
        """Measure the loss."""
        from ..evaluation.loss import fitting_tokens, measure_loss

        fitted = fitting_tokens(decoder, tokens)
        return measure_loss(
            decoder, tokenizer, self.texts, tokens=fitted, description=f"loss{name}"
        )

    def record(self, value: Loss) -> dict[str, Any]:
        """Give a loss."""
        return {"loss": value.to_record()}

    def read(self, record: Mapping[str, Any]) -> Loss:
        """Read a loss."""
        return Loss.from_json(record["loss"])


@dataclass
class PerplexityOfText(Measure[Perplexity]):
    """The perplexity of one text, in windows.

    Attributes:
        text: the text.
        context: tokens of a window.
        bos: whether every window begins with the beginning-of-text token.
        batch_size: windows in one forward.
        source: the file that it was read from.
    """

    text: str
    context: int = 2048
    bos: bool = False
    batch_size: BatchSize = "auto"
    source: str | None = None
    kind = "perplexity"

    @property
    def tokens(self) -> Tokens:  # type: ignore[override]
        """The length of a window."""
        return Tokens(self.context, self.batch_size)

    def inputs(self, store: Store) -> Mapping[str, Any]:
        """Identify the text by its content."""
        return {"text": hash_of(self.text), "bos": self.bos, "tokens": asdict(self.tokens)}

    def token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> "Iterator[NDArray[np.int64]]":
        """Yield the token ids of every window."""
        from ..evaluation.perplexity import windows_of

        windows, _ = windows_of(tokenizer, self.text, self.context, bos=self.bos)
        yield from (ids for _, ids in windows)

    def measure(
        self, decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase", *, tokens: Tokens, name: str
    ) -> Perplexity:
        """Measure the perplexity."""
        from ..evaluation.perplexity import evaluate_perplexity

        return evaluate_perplexity(
            decoder,
            tokenizer,
            self.text,
            context=self.context,
            bos=self.bos,
            batch_size=tokens.batch_size,
            description=f"perplexity{name}",
        )

    def record(self, value: Perplexity) -> dict[str, Any]:
        """Give a perplexity."""
        return {"perplexity": value.to_record()}

    def read(self, record: Mapping[str, Any]) -> Perplexity:
        """Read a perplexity."""
        return Perplexity.from_json(record["perplexity"])


@dataclass
class ScoresOnTasks(Measure[tuple[TaskScores, ...]]):
    """The scores on tasks of lm-eval.

    Attributes:
        names: of the tasks.
        tasks_dir: a folder of task files.
        data: the folder of their data.
        settings: ``max_items``, ``num_shots``, ``pass_at`` and ``seed``.
        batch_size: texts in one forward.
    """

    names: Sequence[str]
    tasks_dir: Path | None = None
    data: Path | None = None
    settings: Mapping[str, int | None] = field(default_factory=dict)
    batch_size: BatchSize = "auto"
    kind = "tasks"

    @property
    def tokens(self) -> Tokens:  # type: ignore[override]
        """The length of a prompt that memory is planned for."""
        return Tokens(PROMPT_TOKENS, self.batch_size)

    def inputs(self, store: Store) -> Mapping[str, Any] | None:
        """Identify task files and their data by content; None for tasks from elsewhere."""
        files = files_of(self.names, tasks_dir=self.tasks_dir, data=self.data)
        try:
            if store.folder is None or files is None:
                return None
            return {
                "tasks": list(self.names),
                "files": hash_of_files(files, store),
                "settings": dict(self.settings),
                "batch_size": self.batch_size,
                "lm_eval": version("lm_eval"),
            }
        except (OSError, PackageNotFoundError):  # loading them says what is wrong
            return None

    @cached_property
    def chosen(self) -> "ChosenTasks":
        """The tasks, loaded, with their items."""
        from ..evaluation.tasks import ChosenTasks

        settings: dict[str, Any] = dict(self.settings)
        return ChosenTasks.of(self.names, tasks_dir=self.tasks_dir, data=self.data, **settings)

    def prepare(self) -> None:
        """Load the tasks and draw their items."""
        self.chosen  # noqa: B018 - it is kept

    def measure(
        self, decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase", *, tokens: Tokens, name: str
    ) -> tuple[TaskScores, ...]:
        """Score the model."""
        return self.chosen.evaluate(
            decoder, tokenizer, batch_size=tokens.batch_size, description=f"tasks{name}"
        )

    def record(self, value: tuple[TaskScores, ...]) -> dict[str, Any]:
        """Give scores."""
        return {"tasks": [one.to_record() for one in value]}

    def read(self, record: Mapping[str, Any]) -> tuple[TaskScores, ...]:
        """Read scores."""
        return tuple(TaskScores.from_json(one) for one in record["tasks"])


@dataclass(frozen=True, slots=True)
class Result:
    """A result, the model that it was measured on, and when, in ISO 8601, if not just now."""

    value: Any
    model: ModelIdentity
    made: str | None = None


class KnownResults:
    """The results of one measure on one model, by the layers that it is without.

    ``inputs`` is all that they depend on beside the layers, or None.
    """

    def __init__(self, store: Store, measure: Measure[Any], inputs: dict[str, Any] | None) -> None:
        self._store, self._measure, self.inputs = store, measure, inputs

    def get(self, dropped: Sequence[int]) -> Result | None:
        """Look a result up, by the layers that the model is without."""
        kind = self._measure.kind
        entry = self._store.find(kind, self._of(dropped))
        if entry is None:
            return None
        try:
            identity = read(ModelIdentity, entry.value["model"])
            return Result(self._measure.read(entry.value), identity, entry.made)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"an entry of the cache is no {kind}: {error}") from error

    def keep(self, dropped: Sequence[int], value: Any, model: ModelIdentity) -> Result:
        """Keep a result that was just measured; ``model`` is the whole one."""
        record = {**self._measure.record(value), "model": asdict(model)}
        self._store.put(self._measure.kind, self._of(dropped), record)
        return Result(value, model)

    def _of(self, dropped: Sequence[int]) -> dict[str, Any] | None:
        return None if self.inputs is None else {**self.inputs, "dropped": list(dropped)}


Results = Mapping[str, Mapping[str, Result]]
"""By the kind of a measure, ``base`` and, with layers, ``cut``."""


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """The measures of a model before and after a cut.

    Attributes:
        source: the model.
        measures: what it is measured by, of different kinds; at least one.
        layers: the plan or the blocks that are cut; None for none.
        device_memory: the memory that may be used, as ``16GB``; what is free by default.
        store: where results are looked for and kept.
        out: the folder for ``eval.json``, if there is to be one.
        overwrite: replace what is there.

    Raises:
        OutputError: ``out`` holds what is read.
    """

    source: ModelSource
    measures: Sequence[Measure[Any]]
    layers: Plan | list[Block] | None = None
    device_memory: str | None = None
    store: Store = field(default_factory=lambda: Store(None))
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.file is not None:
            check_apart(self.file, [self.source.place, *(one.source for one in self.measures)])

    @property
    def file(self) -> Path | None:
        """The file that is written, if there is one."""
        return None if self.out is None else self.out / EVAL_FILE

    @cached_property
    def inputs(self) -> dict[str, dict[str, Any] | None]:
        """All that a measure's results depend on beside the layers, by its kind."""
        return {kind: known.inputs for kind, known in self.results.items()}

    @cached_property
    def job(self) -> str | None:
        """A hash of all that the results depend on but machine and places; None if not known."""
        found = []
        for inputs in self.inputs.values():
            if inputs is None:
                return None
            model = {name: one for name, one in inputs["model"].items() if name != "machine"}
            files = {name: one for name, one in model["model"].items() if name != "names"}
            found.append({**inputs, "model": {**model, "model": files}})
        return hash_of([found, list(self.plan.dropped) if self.plan else []])

    @cached_property
    def results(self) -> dict[str, KnownResults]:
        """The results that are known, by the kind of their measure."""
        own = inputs_of(self.store, {"model": self.source}, {}, device_memory=self.device_memory)
        found = {}
        for measure in self.measures:
            settings = None if own is None else measure.inputs(self.store)
            known = None if settings is None else {**(own or {}), **settings}
            found[measure.kind] = KnownResults(self.store, measure, known)
        return found

    @cached_property
    def whole(self) -> dict[str, Result | None]:
        """The results of the whole model by kind, where they are known."""
        return {kind: known.get(()) for kind, known in self.results.items()}

    @cached_property
    def plan(self) -> Plan | None:
        """The plan of the cut, checked against the number of layers; raises as ``agreed_plan``."""
        if self.layers is None:
            return None
        known = next((one.model for one in self.whole.values() if one), None)
        count = self.source.count_layers() if known is None else known.num_layers
        plan = agreed_plan(str(self.source.path), count, self.layers)
        if known is not None:
            plan.check_model(known)
        return plan

    @property
    def tokens(self) -> Tokens:
        """The longest texts of all measures."""
        return max((one.tokens for one in self.measures), key=lambda tokens: tokens.max_length)

    def memory(self, source: ModelSource, tokens: Tokens | None = None) -> MemoryPlan:
        """Plan the memory of the evaluation, by default of the longest texts."""
        from .forecast import forecast_source

        return forecast_source(
            source, "eval", tokens or self.tokens, device_memory=self.device_memory
        )

    def known(self) -> Results | None:
        """Look for the results; None if one must be measured."""
        plan, found = self.plan, {}
        for kind, known in self.results.items():
            sides = {"base": self.whole[kind]}
            if plan:
                sides["cut"] = known.get(plan.dropped)
            found[kind] = {side: one for side, one in sides.items() if one}
            if len(found[kind]) < len(sides):
                return None
        return found

    def prepare(self) -> None:
        """Find out what is wrong with the measures before a model is loaded."""
        for measure in self.measures:
            measure.prepare()

    def measure(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, dict[str, Result]]:
        """Measure what is not known, on a model as ``source`` loads it, and leave it as it was.

        Raises PlanError for a plan of another model, and what the measures raise.
        """
        from ..cutting.in_model import without_layers
        from ..models.decoder import Decoder

        decoder, plan = Decoder.of(model), self.plan
        if plan:
            plan.check_model(decoder.identity)
        found = {}
        for one in self.measures:
            known = self.whole[one.kind]
            found[one.kind] = {"base": known or self._measured(one, (decoder, tokenizer), ())}
        if plan:
            with without_layers(model, plan.blocks):
                for one in self.measures:
                    known = self.results[one.kind].get(plan.dropped)
                    loaded = decoder, tokenizer
                    found[one.kind]["cut"] = known or self._measured(one, loaded, plan.dropped)
        return found

    def _measured(
        self,
        measure: Measure[Any],
        loaded: "tuple[Decoder, PreTrainedTokenizerBase]",
        dropped: Sequence[int],
    ) -> Result:
        tokens = self.fitted(measure)
        name = f" without {ranges(dropped)}" if dropped else ""
        value = measure.measure(*loaded, tokens=tokens, name=name)
        return self.results[measure.kind].keep(dropped, value, loaded[0].identity)

    def fitted(self, measure: Measure[Any]) -> Tokens:
        """Give the tokens of a measure, of as many texts in a forward as the memory holds."""
        tokens = measure.tokens
        if self.device_memory is None:
            return tokens
        planned = self.memory(self.source.resolved(), tokens)
        return Tokens(tokens.max_length, planned.micro_batch)


@dataclass(frozen=True, kw_only=True)
class EvalPair:
    """Two checkpoints of one tokenizer by the same measures, loaded one after the other.

    Attributes:
        model: that which is compared.
        against: that which it is compared with, which is loaded first.
    """

    model: EvalJob
    against: EvalJob

    def check_tokens(self) -> None:
        """Refuse tokenizers that read a text differently, before a model is loaded: TextsError."""
        store = self.model.store
        kinds = {one.kind: one.inputs(store) for one in self.model.measures}
        models = {"model": self.model.source, "against": self.against.source}
        inputs = None if None in kinds.values() else inputs_of(store, models, {}, measures=kinds)
        if store.get("same_tokens", inputs) is None:
            first, second = (source.load_tokenizer() for source in models.values())
            for measure in self.model.measures:
                pairs = zip_longest(measure.token_ids(first), measure.token_ids(second))
                for index, (one, other) in enumerate(pairs):
                    if one is None or other is None or one.tolist() != other.tolist():
                        raise self._differ(measure.kind, index)
            store.put("same_tokens", inputs, {"same": True})

    def _differ(self, kind: str, index: int) -> TextsError:
        what = "text" if kind == "loss" else "window"
        return TextsError(
            f"{self.model.source} and {self.against.source} have different tokenizers: {what} "
            f"{index} becomes other tokens, so their {kind} cannot be paired by {what}. Compare "
            f"checkpoints of one tokenizer, or by --tasks, whose items are paired (--against)"
        )

    def larger(self) -> tuple[EvalJob, MemoryPlan]:
        """Find which of both needs more memory, or an unknown amount, and its plan."""
        plans = [(job, job.memory(job.source)) for job in (self.model, self.against)]
        sizes = [math.inf if plan.peak_bytes is None else plan.peak_bytes for _, plan in plans]
        return plans[sizes.index(max(sizes))]
