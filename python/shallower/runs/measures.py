"""What a model is measured by, before and after a cut: loss, perplexity, tasks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..evaluation.task_files import files_of
from ..values.hashing import hash_of
from ..values.loss import Loss
from ..values.perplexity import Perplexity
from ..values.task_scores import TaskScores
from ..values.tokens import BatchSize, Tokens
from .inputs import hash_of_files, texts_inputs
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """

    kind: str
    tokens: Tokens

    @abstractmethod
    def inputs(self, store: Store) -> Mapping[str, Any] | None:
        """Tell all that it depends on beside the model; None where it cannot be told."""

    def prepare(self) -> None:
        """Find out what is wrong with it before a model is loaded."""

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
        texts: held-out texts.
        tokens: how they become batches.
    """

    texts: list[str]
    tokens: Tokens = field(default_factory=Tokens)
    kind = "loss"

    def inputs(self, store: Store) -> Mapping[str, Any] | None:
        """Tell the texts by their content."""
        texts = texts_inputs(self.texts, store)
        return texts and {"texts": texts, "tokens": asdict(self.tokens)}

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
    """

    text: str
    context: int = 2048
    bos: bool = False
    batch_size: BatchSize = "auto"
    kind = "perplexity"

    @property
    def tokens(self) -> Tokens:  # type: ignore[override]
        """The length of a window."""
        return Tokens(self.context, self.batch_size)

    def inputs(self, store: Store) -> Mapping[str, Any]:
        """Tell the text by its content."""
        return {"text": hash_of(self.text), "bos": self.bos, "tokens": asdict(self.tokens)}

    def measure(
        self, decoder: "Decoder", tokenizer: "PreTrainedTokenizerBase", *, tokens: Tokens, name: str
    ) -> Perplexity:
        """Measure the perplexity."""
        from ..evaluation.perplexity import evaluate_perplexity

        return evaluate_perplexity(
            decoder, tokenizer, self.text, context=self.context, bos=self.bos,
            batch_size=tokens.batch_size, description=f"perplexity{name}",
        )  # fmt: skip

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
        """Tell the task files and their data by content; None for tasks from elsewhere."""
        files = files_of(self.names, tasks_dir=self.tasks_dir, data=self.data)
        try:
            if store.folder is None or files is None:
                return None
            return {
                "tasks": list(self.names), "files": hash_of_files(files, store),
                "settings": dict(self.settings), "batch_size": self.batch_size,
                "lm_eval": version("lm_eval"),
            }  # fmt: skip
        except (OSError, PackageNotFoundError):  # whoever loads them says what is wrong
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
        """Ask the model."""
        return self.chosen.evaluate(
            decoder, tokenizer, batch_size=tokens.batch_size, description=f"tasks{name}"
        )

    def record(self, value: tuple[TaskScores, ...]) -> dict[str, Any]:
        """Give scores."""
        return {"tasks": [one.to_record() for one in value]}

    def read(self, record: Mapping[str, Any]) -> tuple[TaskScores, ...]:
        """Read scores."""
        return tuple(TaskScores.from_json(one) for one in record["tasks"])
