"""Study: models, texts and settings, and the folder that holds what was found about them.

``run``, ``curve`` and ``compare`` share the three sets of texts, the identity of a study, its
folder, and what is refused before heavy work. Each writes before its next step.
"""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ..cutting.source import typed_place
from ..errors import ModelError, TextsError
from ..models.source import ModelSource
from ..processes import check_alone, held
from ..settings.studies import Prompts, StudySettings
from ..storage import check_apart, check_free, check_room, write_file
from ..store.given_models import InMemory, ModelStore, inputs_of_one
from ..store.inputs import items_of, texts_inputs
from ..store.store import Entry, Store
from ..texts.options import OptionItem, options_fingerprint, read_options
from ..texts.prompts import Prompt, given_prompts, prompts_fingerprint, read_prompts
from ..texts.sequences import ReadOnce
from ..texts.sources import Texts, place_of_texts
from ..texts.splits import two_splits
from ..values.counts import summed
from ..values.provenance import hash_of, option_words
from .disk import study_bytes, temporary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..texts.splits import Splits

Items = Sequence[OptionItem] | Sequence[Prompt]


def judged_items(
    judge: str, *, options: str | Path | None = None, prompts: Prompts = None, seed: int
) -> tuple[Items, Items]:
    """Read the selection and test items; none of a judge of texts.

    Prompts of the judge ``speech`` are by default our own. Raises TextsError for what is none, and
    for fewer than 8 items.
    """
    if judge == "options" and options is not None:
        return two_splits(read_options(options), seed=seed)
    if judge == "speech":
        named = ("prompts", "prompts, --prompts, --speech")
        return two_splits(given_prompts(prompts), key=_asked, what=named, seed=seed)
    return (), ()


def _asked(prompt: Prompt) -> str:
    """What a prompt asks, whatever was answered."""
    return json.dumps([prompt.text, [*map(dict, prompt.messages)]])


def items_fingerprint(judge: str, items: Any) -> str:
    """SHA-256 of items of a judge, whatever file they are in; that of nothing where it has none."""
    return prompts_fingerprint(items) if judge == "speech" else options_fingerprint(items)


Settings = TypeVar("Settings", bound=StudySettings)

NUM_PROMPTS = 24
"""Prompts of our own that models speak on: as many of each kind."""

HELD_OUT_EVERY = 4
"""Every fourth text reports, where no held-out texts are given."""


WHOLE, SINGLE_LAYERS = "whole model", "true losses without single layers"
"""Parts of a study that belong to no criterion or strategy."""


@dataclass(frozen=True, slots=True)
class Part:
    """Measurements of a study that one worker makes, and keeps in a store.

    Its settings are those of the study without what other parts measure.
    """

    what: str
    model: str
    texts: str
    settings: StudySettings

    def __str__(self) -> str:
        return f"{self.what} of {self.model} on {self.texts}"


@dataclass(frozen=True, kw_only=True)
class Study(Generic[Settings]):
    """Settings, models and texts, checked when the value is made.

    Without ``eval_texts`` every fourth of ``texts`` is of the test set. ``command`` has the words
    of the command line, without places; ``identities`` are of the models in the store of the
    process that this one measures for; ``readings`` is what was read of each model whose layers are
    streamed. TextsError: texts that are not text. OutputError: ``out`` is, holds or lies in what is
    read.
    """

    RESULTS: ClassVar[str]
    """The file of the results, which says whose they are."""

    models: Sequence[ModelSource | InMemory]
    texts: Iterable[str] | Mapping[str, Iterable[str]]
    eval_texts: Iterable[str] | None
    settings: Settings
    out: Path | None
    overwrite: bool = False
    store: Store = field(default_factory=lambda: Store(None))
    command: str = ""
    progress: bool | None = None
    identities: Sequence[Mapping[str, Any]] | None = None
    readings: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        named = self.named_texts
        if not named or not all(isinstance(name, str) and name for name in named):
            raise TextsError(f"texts by name: expected names that are not empty, got {[*named]}")
        for source in (*named.values(), self.eval_texts):
            if isinstance(source, str | bytes) or not isinstance(source, Iterable | None):
                raise TextsError(f"texts must be an iterable of strings: {type(source).__name__}")
            if isinstance(source, Texts):
                source.check()
        if len(self.models) == 1 and isinstance(self.model, ModelSource):  # of several others go on
            self.model.check()
        for name in self.leaves if self.out is not None else ():
            check_apart(self.folder / name, self.reads)

    @property
    def reads(self) -> list[object]:
        """The places that are read, by their text."""
        texts = (*self.named_texts.values(), self.eval_texts)
        settings = ("options", "tasks_dir", "data", "prompts", "answers")
        places = (getattr(self.settings, name, None) for name in settings)
        return [
            *(model.place for model in self.models),
            *map(place_of_texts, texts),
            *(place for place in places if isinstance(place, str | Path)),
        ]

    @property
    def leaves(self) -> Sequence[str]:
        """The names in ``out`` that must not be there before, but for a study that goes on."""
        return (self.RESULTS,)

    def check(self) -> None:
        """Refuse what cannot be: ShallowerError. Room on disk comes last, as a model is built."""
        if "speech" in self.judges:
            way_out = "leave out --stream, or the judge speech (judge, --judge)"
            self.refuse_on_disk("every token of an answer", way_out)
        if self.out is not None:
            check_alone(self.out, inside=True)
            for name in () if self.goes_on else self.leaves:
                check_free(self.out / name, self.overwrite)
        self.check_kind()
        if self.out is not None:
            check_room(self.out / self.RESULTS, study_bytes(self), temporary_of(self))

    def check_kind(self) -> None:
        """Refuse what this kind of study cannot do."""

    def alone(self) -> AbstractContextManager[None]:
        """Hold the folder against other processes while the body works in it: OutputError."""
        return nullcontext() if self.out is None else held(self.out, inside=True)

    def units(self) -> list[str]:
        """Name the measurements that the study makes, as far as they are known beforehand."""
        return []

    def unit(self, strategy: str, n: int, state: str, **on: str) -> str:
        """Name a measurement by its strategy, the number of layers that go and a state.

        ``on`` names the model and the texts of a study of several.
        """
        several = [on["model"]] if len(self.models) > 1 else []
        several += [on["texts"]] if len(self.named_texts) > 1 else []
        return ", ".join([*several, f"n = {n}", strategy, state])

    def refuse_on_disk(self, work: str, way_out: str) -> None:
        """Refuse work that reads all layers often, where these are streamed: ModelError."""
        if any(model.is_streamed for model in self.models):
            raise ModelError(
                f"the layers of the model are streamed (--stream), and all would be read by "
                f"{work}: {way_out}"
            )

    def load(
        self, model: ModelSource | InMemory
    ) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load a model; what is read of layers on disk from here on is counted."""
        loaded, tokenizer = model.load(self.progress)
        if model.is_streamed:
            from ..models.offload import reading_of

            self.readings.append(reading_of(loaded))
        return loaded, tokenizer

    def say_read(self) -> None:
        """Say on standard error what was read of layers on disk."""
        for reading in self.readings if self.progress is not False else ():
            print(reading, file=sys.stderr, flush=True)

    @property
    def read(self) -> dict[str, int]:
        """The passes over layers on disk, and the bytes of them; nothing of models in memory."""
        return summed(reading.to_json() for reading in self.readings)

    # What the study is of.
    @property
    def model(self) -> ModelSource | InMemory:
        """The one model of a study of one."""
        return self.models[0]

    @cached_property
    def named_texts(self) -> Mapping[str, Iterable[str]]:
        """The calibration texts by their names."""
        return self.texts if isinstance(self.texts, Mapping) else {"texts": self.texts}

    @cached_property
    def _read(self) -> dict[str, ReadOnce]:
        return {name: ReadOnce(texts) for name, texts in self.named_texts.items()}

    @cached_property
    def splits(self) -> "dict[str, Splits[str]]":
        """Calibration, selection and test texts, by the name of the calibration texts."""
        from ..texts.splits import three_splits

        settings, found = self.settings, {}
        report = None
        if self.eval_texts is not None:
            report = list(islice(self.eval_texts, settings.max_eval_texts))
        for name, read in self._read.items():
            texts = list(islice(read, settings.max_texts))
            held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY][: settings.max_eval_texts]
            found[name] = three_splits(
                texts,
                held_out if report is None else report,
                num_choosing=settings.num_choosing,
                seed=settings.seed,
            )
        return found

    @property
    def split(self) -> "Splits[str]":
        """Calibration, selection and test texts, of a study on one kind of texts."""
        return next(iter(self.splits.values()))

    @property
    def judges(self) -> tuple[str, str]:
        """The judge by which cuts are chosen, and that which scores them on the test set."""
        return getattr(self.settings, "judge", "loss"), "loss"

    @cached_property
    def items(self) -> tuple[Items, Items]:
        """The selection and test items, of a judge that has its own; else none."""
        return (), ()

    @cached_property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts that models speak on; none where no speech is measured."""
        given = getattr(self.settings, "prompts", ())
        if given is None:
            return read_prompts(limit=NUM_PROMPTS)
        return given_prompts(given) if isinstance(given, Path) or given else ()

    def training_texts(self, name: str = "") -> ReadOnce:
        """All but the selection and test texts, as many as a training takes; by default the first.

        Calibration texts of a study on several have a ``name``.
        """
        name = name or next(iter(self._read))
        more = islice(self._read[name], self.settings.max_texts, None)
        return ReadOnce(self.splits[name].training(more))

    @cached_property
    def again(self) -> str:
        """The command line that makes the study again; of a call from Python, one like it."""
        if self.command:
            return self.command
        models = (word for model in self.models for word in model_words(model, dtype=True))
        words = ["shallower", self.settings.COMMAND, *models]
        for texts in self.named_texts.values():
            words += ["--texts", _texts_word(texts, "TEXTS")]
        if self.eval_texts is not None:
            words += ["--eval-texts", _texts_word(self.eval_texts, "EVAL_TEXTS")]
        words += self.settings.to_words()
        return shlex.join([*words, *(["--out", self.out.resolve().name] if self.out else [])])

    @property
    def again_by_eval(self) -> str:
        """The options of ``shallower eval`` for the test texts, if they are others, of a place."""
        if self.eval_texts is None or (self.command and not place_of_texts(self.eval_texts)):
            return ""
        word, settings = _texts_word(self.eval_texts, "EVAL_TEXTS"), self.settings
        options = {"texts": word, "max_texts": settings.max_eval_texts}
        return shlex.join(option_words({**options, "max_length": settings.max_length}))

    @property
    def tested(self) -> str:
        """The name of the file or dataset of the test texts; empty where they have none."""
        return place_of_texts(self.eval_texts or next(iter(self.named_texts.values()))) or ""

    @property
    def origin(self) -> tuple[str, bool]:
        """The name of the model, and whether its own code may be run."""
        trusted = isinstance(self.model, ModelSource) and self.model.trust_remote_code
        return str(self.model), trusted

    # What distinguishes the study.
    @cached_property
    def of_models(self) -> dict[str, dict[str, Any] | None]:
        """All that results depend on of each model, by its name; the hub is queried once."""
        if self.identities is not None:
            return dict(zip(map(str, self.models), map(dict, self.identities), strict=True))
        if self.store.folder is None:
            return dict.fromkeys(map(str, self.models))
        return {str(model): inputs_of_one(model, self.store) for model in self.models}

    def model_store(self, model: ModelSource | InMemory) -> ModelStore:
        """The results of one model in the store."""
        return ModelStore(self.store, self.of_models[str(model)], [])

    @cached_property
    def fitted(self) -> dict[str, str]:
        """Hashes of the calibration and selection texts, by their name."""
        tokens = asdict(self.settings.tokens)
        return {
            name: hash_of([splits.fit, splits.choose, tokens])
            for name, splits in self.splits.items()
        }

    @cached_property
    def reported(self) -> str:
        """A hash of the test texts."""
        return str(items_of(self.split.report, self.settings.tokens, self.store))

    def trained_on(self) -> Any:
        """The identity of the texts of a healing, as far as that is known."""
        named = self.named_texts.values()
        if not all(isinstance(texts, Texts | Sized) for texts in named):
            return None  # an iterator can be read once, and need not end
        sources = ((texts, str(getattr(texts, "source", None))) for texts in named)
        return [texts_inputs(texts, self.store) or source for texts, source in sources]

    @cached_property
    def inputs(self) -> dict[str, Any] | None:
        """All that the results depend on; None where that is not known, and nothing is kept."""
        if self.store.folder is None or not self.is_stock():
            return None
        return {
            "models": list(self.of_models.items()),
            "texts": list(self.fitted.items()),
            "reported": self.reported,
            "settings": self.settings.to_json(),
            **self.more_inputs(),
        }

    def more_inputs(self) -> dict[str, Any]:
        """What the results of one kind of study depend on beside its settings and texts."""
        return {}

    def is_stock(self) -> bool:
        """Whether all that takes part is of this package, whose code is part of every key."""
        return None not in self.of_models.values()

    @cached_property
    def job(self) -> str | None:
        """A hash of all that the study depends on; None where that is not known."""
        return None if self.inputs is None else self.store.key(self.settings.COMMAND, self.inputs)

    @cached_property
    def entry(self) -> Entry | None:
        """The whole study in the store, if it is cached."""
        return self.store.find("study", self.inputs)

    # What lies in its folder.
    @property
    def folder(self) -> Path:
        """The folder of a study that writes."""
        assert self.out is not None
        return self.out

    @cached_property
    def written(self) -> dict[str, Any] | None:
        """The results in ``out`` as far as they came, if they are of this very study."""
        if self.out is None or self.overwrite:
            return None
        try:
            values = json.loads((self.out / self.RESULTS).read_bytes())
            job = self._job_in(values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return values if job is not None and job == self.job else None

    @staticmethod
    def _job_in(values: Any) -> Any:
        """The job that results were written by."""
        return values["job"]

    @property
    def goes_on(self) -> bool:
        """Whether what is in ``out`` is of this very study, which may have been cut short."""
        return self.written is not None

    def write(self, values: Mapping[str, Any]) -> None:
        """Write the results as far as they are known, before the next step."""
        if self.out is not None:
            beside = {"job": self.job, "command": self.again}
            content = json.dumps({**values, **beside}, indent=2) + "\n"
            write_file(self.out / self.RESULTS, content.encode())


def model_words(model: ModelSource | InMemory, *, dtype: bool = False) -> list[str]:
    """Name a model for a command line, by its last part if it is a place; MODEL in memory.

    With the options that load it, but its ``dtype`` only on demand.
    """
    if not isinstance(model, ModelSource):
        return ["MODEL", *option_words({"stream": model.is_streamed})]
    options: dict[str, Any] = {"dtype": model.dtype if dtype and model.dtype != "auto" else None}
    options |= {"gguf_file": model.gguf_file, "trust_remote_code": model.trust_remote_code}
    options |= {"stream": model.is_streamed}
    return [typed_place(model.path), *option_words(options)]


def _texts_word(texts: object, otherwise: str) -> str:
    """Name texts for a command line; ``otherwise`` where they were given as strings."""
    place = place_of_texts(texts)
    return otherwise if place is None else typed_place(place)
