"""Story: a result as plain values, which every writer writes; knows no model and no HTML."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..results.scores import Estimate, Scores
from ..results.task_scores import TaskScores
from ..values.counts import with_error
from ..values.schema import finite, of_type
from .charts.drawing import Drawing

STORY_FORMAT = "shallower.report"
"""The format of the JSON beside a page."""

MODELS = ("whole", "cut", "patched", "healed")
"""The models of a run, from the whole one on."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a table, by which its column is sorted."""

    text: str  # as it is shown
    value: float = math.nan  # NaN where it is not known

    @classmethod
    def of(
        cls,
        value: float | None,
        stderr: float | None = None,
        digits: int = 3,
        *,
        sign: bool = False,
    ) -> "Number":
        """Write a value with its standard error, if it has one; a dash where it is not known."""
        if value is None or not math.isfinite(value):
            return cls("–")
        return cls(with_error(value, stderr, digits, sign=sign), value)

    @classmethod
    def estimate(
        cls,
        found: Estimate | Scores | TaskScores | None,
        digits: int = 3,
        *,
        sign: bool = False,
        scale: float = 1.0,
    ) -> "Number":
        """Write a figure times ``scale`` with its standard error; a dash where there is none."""
        if found is None:
            return cls("–")
        return cls.of(scale * found.mean, scale * found.stderr, digits, sign=sign)

    @classmethod
    def share(cls, value: float | None, digits: int = 0) -> "Number":
        """Write a share as per cent."""
        if value is None or not math.isfinite(value):
            return cls("–")
        return cls(f"{100 * value:.{digits}f} %", value)

    @classmethod
    def count(cls, value: int | None) -> "Number":
        """Write a whole number, in groups of three digits."""
        return cls("–") if value is None else cls(f"{value:,}", float(value))

    @property
    def bare(self) -> str:
        """The text without the standard error."""
        return self.text.split(" ± ")[0]


Cell = str | Number


@dataclass(frozen=True, slots=True)
class Table:
    """A table."""

    title: str  # a headline
    head: tuple[str, ...]  # names of the columns
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""  # what must be known to read it
    marked: int | None = None  # the row that is recommended
    bare: tuple[str, ...] = ()  # columns without errors in a terminal
    wide: tuple[str, ...] = ()  # columns that a terminal leaves out
    is_grouped: bool = False  # rows of the same first cell belong together


@dataclass(frozen=True, slots=True)
class Strip:
    """All layers of a model in a row, those that go among them."""

    name: str  # of the cut
    num_layers: int
    dropped: tuple[int, ...]
    words: str  # the layers that go


@dataclass(frozen=True, slots=True)
class ModelState:
    """A state of the model, on the way from the whole one to the one that is recommended."""

    name: str  # `whole`, `cut`, `patched` or `healed`
    loss: Number  # nats a token
    more: str = ""  # above the whole model, paired
    share: float = 0.0  # of the greatest loss above the whole model, 0 to 1
    chosen: bool = False  # recommended


@dataclass(frozen=True, slots=True)
class Fact:
    """A number or a word, with where it is from."""

    name: str
    value: Cell
    source: str = ""  # file and place; what it was measured on


@dataclass(frozen=True, slots=True)
class PromptSample:
    """A prompt, and how the models continue it."""

    prompt: str
    continued: Mapping[str, str]  # by model

    def to_json(self) -> dict[str, str | None]:
        """Give the prompt, and what each model of a run says, None for one that is not there."""
        return {"prompt": self.prompt, **dict.fromkeys(MODELS), **self.continued}

    @classmethod
    def from_json(cls, values: Mapping[str, str | None]) -> "PromptSample":
        """Read a sample; KeyError or TypeError for what is none."""
        said = {name: values[name] for name in MODELS}
        known = {name: of_type(str, text) for name, text in said.items() if text is not None}
        return cls(of_type(str, values["prompt"]), known)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a story."""

    title: str
    lines: tuple[str, ...] = ()  # a paragraph each
    facts: tuple[Fact, ...] = ()
    tables: tuple[Table, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    samples: tuple[PromptSample, ...] = ()  # of generation
    commands: tuple[str, ...] = ()  # lines for a shell


@dataclass(frozen=True, slots=True)
class Story:
    """A result; the first screen of its page comes first."""

    kind: str  # `run`, `comparison` or `curve`
    title: str  # the model
    sentence: str  # the result in one sentence
    strips: tuple[Strip, ...] = ()  # layers that go
    steps: tuple[ModelState, ...] = ()  # the cost, state by state
    cost: str = ""  # in a few words
    savings: tuple[Fact, ...] = ()
    warnings: tuple[str, ...] = ()  # before it is trusted
    sections: tuple[Section, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)  # as plain JSON values

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        """All figures, in the order of the page."""
        return tuple(one for section in self.sections for one in section.drawings)

    def to_json(self) -> dict[str, Any]:
        """Give ``report.json``: the words, the facts with their sources, the data."""
        facts = [*self.savings, *(fact for section in self.sections for fact in section.facts)]
        return {
            "format": STORY_FORMAT,
            "version": 1,
            "kind": self.kind,
            "title": self.title,
            "sentence": self.sentence,
            "cost": self.cost,
            "warnings": list(self.warnings),
            "dropped": {strip.name: list(strip.dropped) for strip in self.strips},
            "facts": [_fact(fact) for fact in facts],
            "figures": [drawing.name for drawing in self.drawings],
            "data": without_items(dict(self.data)),
        }


def text_of(cell: Cell) -> str:
    """The text of a cell."""
    return cell if isinstance(cell, str) else cell.text


def _fact(fact: Fact) -> dict[str, Any]:
    known = {} if isinstance(fact.value, str) else {"value": finite(fact.value.value)}
    return {"name": fact.name, "shown": text_of(fact.value), **known, "source": fact.source}


BY_ITEM = ("by_text", "by_item", "by_prompt", "items", "marks", "job")
"""Values that are as many as texts or prompts, or distinguish one machine's work from another's."""


def without_items(value: Any) -> Any:
    """Leave out lists by text, training steps and infinite values; of places keep the last part."""
    if isinstance(value, Mapping):
        return {
            without_items(key): without_items(one)
            for key, one in value.items()
            if key not in BY_ITEM and not (key == "steps" and isinstance(one, list))
        }
    if isinstance(value, list | tuple):
        return [without_items(one) for one in value]
    if isinstance(value, str):
        is_place = value[:1] in ("/", "~") and not value.startswith("//") and " " not in value
        return value.rstrip("/").rsplit("/", 1)[-1] if is_place else value
    return finite(value) if isinstance(value, float) else value
