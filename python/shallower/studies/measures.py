"""Measures of a model and of a cut; ``MEASURES`` in ``evaluate.py`` lists them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from uuid import uuid4

from ..errors import ProcessesError, SettingsError
from ..evaluation.task_files import check_names, files_in, files_of
from ..models.source import ModelSource
from ..results.loss import Loss
from ..results.perplexity import Perplexity
from ..results.task_scores import TaskScores
from ..settings.options import parse_names
from ..settings.stages import EvalSettings
from ..settings.studies import CompareSettings
from ..storage import absolute
from ..store.inputs import hash_of_files, texts_content
from ..store.store import Store
from ..texts.sources import Texts, read_whole
from ..values.entries import recalled
from ..values.identity import ModelIdentity
from ..values.plan import Plan, key_of
from ..values.provenance import LM_EVAL, hash_of, versions
from ..values.schema import plain
from ..values.tokens import BatchSize, Tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from ..evaluation.batches import AllBatches
    from ..evaluation.tasks import ChosenTasks
    from ..forecasts.speed import Work
    from ..models.decoder import Decoder
    from ..values.entries import ResultStore

    Loaded = tuple[Decoder, PreTrainedTokenizerBase]

T = TypeVar("T")

PROMPT_TOKENS = 2048
"""Tokens of a task's prompt that memory is planned for."""


class Measure(ABC, Generic[T]):
    """A measure of a model, whose results are kept.

    ``option`` is the field of :class:`EvalSettings` that asks for it, ``item`` what results are
    paired by. ``shared`` are the settings of its shards beside that option; where its items do not
    fall into shards it is None, and ``apart`` the way out. ``whole`` is the whole model where that
    is another checkpoint than what is measured.
    """

    kind: str
    option: str
    item: str
    result: Any
    shared: Sequence[str] | None = None
    apart: str = "measure it apart"
    named_by: EvalSettings | None = None
    needs_whole: bool = False
    tokens: Tokens = Tokens()
    source: str | None = None
    whole: ModelSource | None = None

    @classmethod
    @abstractmethod
    def of(cls, what: Any, settings: EvalSettings, *, is_shared: bool) -> Self:
        """Make it of its option; what other processes read too, where it is shared, is named."""

    @classmethod
    def of_settings(cls, settings: EvalSettings, *, is_shared: bool) -> Self:
        """Make it as settings ask for it."""
        made = cls.of(getattr(settings, cls.option), settings, is_shared=is_shared)
        made.named_by = settings
        return made

    @abstractmethod
    def inputs(self, store: Store) -> Mapping[str, Any] | None:
        """Name all that it depends on beside the model; None where that is not known."""

    def described(self) -> dict[str, Any]:
        """Give the settings by which other processes make it.

        Raises SettingsError where its items do not fall into shards, and ProcessesError where
        nothing names them.
        """
        if self.shared is None:
            raise SettingsError(
                f"--{self.option} is measured by one process: leave out --shard, --workers and "
                f"--on, and {self.apart}"
            )
        if self.named_by is None:
            raise ProcessesError("workers read texts themselves: name a file or a dataset")
        place = absolute(getattr(self.named_by, self.option))
        return {self.option: place} | {name: getattr(self.named_by, name) for name in self.shared}

    def key(self, store: Store) -> dict[str, Any] | None:
        """Give what its results in the store are found by, beside the model and the cut."""
        inputs = self.inputs(store)
        return None if inputs is None else {"measure": self.kind, **inputs}

    def prepare(self) -> None:
        """Find out what is wrong with it before a model is loaded."""

    def token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> "Iterator[NDArray[np.int64]]":
        """Yield the token ids of every text or window, which results are paired by; of tasks none,
        whose items are not known by their tokens.
        """
        yield from ()

    def take_reference(self, loaded: "Loaded", *, tokens: Tokens, store: "ResultStore") -> None:
        """See the whole model before anything is measured; ``store`` has that one's results."""

    @abstractmethod
    def measure(
        self, loaded: "Loaded", *, tokens: Tokens, plan: Plan | None, store: "ResultStore | None"
    ) -> Any:
        """Measure a model without what a plan drops; the whole one has none.

        ``store`` has results of the whole one.
        """

    def kept(
        self,
        loaded: "Loaded",
        store: "ResultStore | None",
        key: Mapping[str, Any] | None,
        *,
        tokens: Tokens,
        plan: Plan | None,
    ) -> T:
        """Measure a model without what a plan drops, unless ``store`` has that under ``key``."""
        from ..cutting.in_model import without_layers

        decoder = loaded[0]
        known = store.get("measurement", {**key, **key_of(plan)}) if store and key else None
        if known is not None:
            return recalled(self.read, known, "a measurement")
        if store is not None:
            self.take_reference(loaded, tokens=tokens, store=store)
        with without_layers(decoder.model, plan) if plan else nullcontext():
            value = self.measure(loaded, tokens=tokens, plan=plan, store=store)
        found = self.complete(value, decoder)
        return self.keep(store, key, found, plan=plan, model=decoder.identity)

    def keep(
        self,
        store: "ResultStore | None",
        key: Mapping[str, Any] | None,
        value: T,
        *,
        plan: Plan | None,
        model: ModelIdentity,
    ) -> T:
        """Keep a result of a model without what a plan drops; ``model`` is the whole one."""
        if store is not None and key is not None:
            entry = {**self.record(value), "model": asdict(model)}
            store.put("measurement", {**key, **key_of(plan)}, entry)
        return value

    def complete(self, value: Any, decoder: "Decoder") -> T:
        """Complete what was measured, when the whole model is there."""
        found: T = value
        return found

    def work(self, lengths: "NDArray[np.int64]", *, layers: int, whole: int) -> "Work":
        """Count what is run of a model of some layers, which is compared with one of ``whole``."""
        from ..forecasts.work import run

        return run(lengths, layers, 1)

    def lengths(self, tokenizer: "PreTrainedTokenizerBase") -> "NDArray[np.int64]":
        """Count the tokens of every text, window or prompt, (S,); of tasks nothing is known."""
        import numpy as np

        return np.array([len(ids) for ids in self.token_ids(tokenizer)])

    def record(self, value: T) -> dict[str, Any]:
        """Give a result as plain JSON values."""
        return {self.kind: plain(value, "to_record")}

    def read(self, record: Mapping[str, Any]) -> T:
        """Read a result; raises KeyError, TypeError, ValueError."""
        found: T = self.result.from_json(record[self.kind])
        return found


@dataclass
class LossOfTexts(Measure[Loss]):
    """The next-token loss on held-out texts, which can be read again."""

    texts: Texts | list[str]
    tokens: Tokens = field(default_factory=Tokens)
    source: str | None = None
    kind, option, item = "loss", "texts", "text"
    shared = ("max_texts", "max_length", "batch_size")
    result = Loss

    @classmethod
    def of(cls, what: str, settings: EvalSettings, *, is_shared: bool) -> Self:
        """Open the texts, and read those of this process alone, once."""
        texts = Texts(what, settings.max_texts).check()
        return cls(texts if is_shared else [*texts], settings.tokens, what)

    def inputs(self, store: Store) -> Mapping[str, Any] | None:
        """Identify the texts by their content."""
        texts = texts_content(self.texts, store)
        return texts and {"texts": texts, "tokens": asdict(self.tokens)}

    def token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> "Iterator[NDArray[np.int64]]":
        """Yield the token ids of every text."""
        from ..texts.batches import tokenise

        yield from (one.ids for one in tokenise(tokenizer, self.texts, self.tokens.max_length))

    def measure(
        self, loaded: "Loaded", *, tokens: Tokens, plan: Plan | None, store: "ResultStore | None"
    ) -> Loss:
        """Measure the batches that were not measured before, by any command."""
        from ..evaluation.loss import measure_loss

        how: Any = {"tokens": tokens, "plan": plan, "store": store}
        return measure_loss(*loaded, self.texts, description=bar_of("loss", plan), **how)

    def batches(self, tokenizer: "PreTrainedTokenizerBase", tokens: Tokens) -> "AllBatches":
        """Divide the texts."""
        from ..evaluation.batches import batches_of_texts

        return batches_of_texts(tokenizer, self.texts, tokens)


@dataclass
class PerplexityOfText(Measure[Perplexity]):
    """The perplexity of one text, in windows of ``context`` tokens."""

    text: str
    context: int = 2048
    bos: bool = False
    batch_size: BatchSize = "auto"
    source: str | None = None
    kind = option = "perplexity"
    item, shared = "window", ("context", "bos", "batch_size")
    result = Perplexity

    @classmethod
    def of(cls, what: str, settings: EvalSettings, *, is_shared: bool) -> Self:
        """Read the text."""
        size = settings.batch_size
        return cls(read_whole(what), settings.context, settings.bos, size, source=what)

    @property
    def tokens(self) -> Tokens:  # type: ignore[override]
        """The length of a window."""
        return Tokens(self.context, self.batch_size)

    def inputs(self, store: Store) -> Mapping[str, Any]:
        """Identify the text by its content."""
        return {"text": hash_of(self.text), "bos": self.bos, "tokens": asdict(self.tokens)}

    def token_ids(self, tokenizer: "PreTrainedTokenizerBase") -> "Iterator[NDArray[np.int64]]":
        """Yield the token ids of every window."""
        from ..evaluation.batches import windows_of

        windows, _ = windows_of(tokenizer, self.text, self.context, bos=self.bos)
        yield from (ids for _, ids in windows)

    def measure(
        self, loaded: "Loaded", *, tokens: Tokens, plan: Plan | None, store: "ResultStore | None"
    ) -> Perplexity:
        """Measure the batches of windows that were not measured before."""
        from ..evaluation.loss import fitting_tokens, scores_of

        decoder, tokenizer = loaded
        windows, name = self.batches(tokenizer, fitting_tokens(decoder, tokens)), self.kind
        how: Any = {"plan": plan, "store": store, "name": bar_of(name, plan)}
        return windows.perplexity(scores_of(decoder, windows, **how)[0])

    def batches(self, tokenizer: "PreTrainedTokenizerBase", tokens: Tokens) -> "AllBatches":
        """Divide the windows."""
        from ..evaluation.batches import batches_of_windows

        return batches_of_windows(tokenizer, self.text, tokens, bos=self.bos)


@dataclass
class ScoresOnTasks(Measure[tuple[TaskScores, ...]]):
    """The scores on tasks of lm-eval."""

    names: Sequence[str]
    settings: EvalSettings | CompareSettings
    progress: bool | None = None
    kind = option = "tasks"
    item, apart = "item", "share them by naming one task a command"

    @classmethod
    def of(cls, what: str, settings: EvalSettings, *, is_shared: bool) -> Self:
        """Name the tasks."""
        return cls(parse_names(what), settings)

    @property
    def tokens(self) -> Tokens:  # type: ignore[override]
        """The length of a prompt that memory is planned for."""
        return Tokens(PROMPT_TOKENS, self.settings.batch_size)

    def inputs(self, store: Store) -> Mapping[str, Any] | None:
        """Identify tasks by the content of their files and data, or by their items where they are
        from elsewhere.
        """
        given, drawn = self.settings, ("max_items", "num_shots", "pass_at", "seed")
        if store.folder is None:
            return None
        files = files_of(self.names, tasks_dir=given.tasks_dir, data=given.data)
        harness = versions(LM_EVAL).get(LM_EVAL)
        if harness is None:  # loading them says that it is missing
            return None
        try:
            hashed = None if files is None else hash_of_files(files, store)
        except OSError:  # of a file that maybe no task reads
            hashed = None
        if hashed is None:
            return {"items": self.identity, "batch_size": given.batch_size}
        return {
            "tasks": list(self.names),
            "files": hashed,
            "settings": {name: getattr(given, name) for name in drawn},
            "batch_size": given.batch_size,
            "lm_eval": harness,
        }

    @cached_property
    def identity(self) -> str:
        """A hash of the tasks with their items, and of the files given: they may have code.

        One of its own where a file cannot be read, or imports what is not found.
        """
        chosen, folder = self.chosen.identity, self.settings.tasks_dir
        try:
            files = files_in(folder) if folder else []
            return hash_of([chosen, hash_of_files(files, Store(None))])
        except (LookupError, OSError):
            return uuid4().hex

    @cached_property
    def chosen(self) -> "ChosenTasks":
        """The tasks, loaded, with their items."""
        check_names(self.names, self.settings.tasks_dir, self.settings.data)
        from ..evaluation.tasks import ChosenTasks

        return ChosenTasks.of(self.names, self.settings)

    def prepare(self) -> None:
        """Load the tasks and draw their items."""
        self.chosen  # noqa: B018 - it is kept

    def measure(
        self, loaded: "Loaded", *, tokens: Tokens, plan: Plan | None, store: "ResultStore | None"
    ) -> tuple[TaskScores, ...]:
        """Score the model."""
        bar: Any = {"progress": self.progress, "description": bar_of("tasks", plan)}
        return self.chosen.evaluate(*loaded, batch_size=tokens.batch_size, **bar)

    def main(self, scores: Sequence[TaskScores]) -> tuple[TaskScores, ...]:
        """Select the main score of each task; those of sampled answers come behind."""
        found: dict[str, TaskScores] = {}
        for one in scores:
            found.setdefault(one.task, one)
            if one.metric == f"pass@{self.settings.pass_at}":
                name = f"{one.task} sampled"
                found[name] = replace(one, task=name)
        return tuple(found.values())

    def read(self, record: Mapping[str, Any]) -> tuple[TaskScores, ...]:
        """Read scores."""
        return tuple(TaskScores.from_json(one) for one in record["tasks"])


def bar_of(what: str, plan: Plan | None) -> str:
    """Name a bar of a measure."""
    return what if plan is None else f"{what} without {plan.words}"
