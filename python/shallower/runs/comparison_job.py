"""A comparison of criteria: checked before anything is loaded, resumed, known by the cache."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    CriterionError,
    LayersError,
    MissingExtraError,
    ModelError,
    ShallowerError,
    TextsError,
)
from ..models.source import ModelSource
from ..processes import refuse_several
from ..storage import check_free, write_file
from ..texts.options import OptionItem, options_fingerprint, read_options
from ..values.comparison import CriteriaComparison
from ..values.files import COMPARISON_FILE, COMPARISON_TABLE
from ..values.layers import layer_number
from ..values.tokens import Tokens
from .cache import Cache, Entry
from .cache_keys import machine, made_by, model_inputs
from .journal import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..judgement.comparing import Outcome
    from ..judgement.criterion import Criterion
    from ..judgement.splits import Splits

MAX_TEXTS = 80
"""Calibration texts by default: 64 that fit, and 16 that choose."""

MAX_EVAL_TEXTS = 64
"""Texts that report, by default."""

SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class InMemory:
    """A model in memory with its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    def __str__(self) -> str:
        return str(self.model.name_or_path) or type(self.model).__name__

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Give the model, and its tokenizer."""
        return self.model, self.tokenizer

    def inputs(self, cache: Cache) -> dict[str, Any] | None:
        """All that the model's results depend on, for the cache; None where it is off."""
        if cache.folder is None:
            return None
        from ..models.identity import weights_hash

        content = weights_hash(self.model)
        if content is None:
            return None
        return {
            "weights": content,
            "tokenizer": _told(self.tokenizer),
            "device": str(self.model.device),
            "machine": machine(),
            "made_by": made_by(),
        }


@dataclass(frozen=True, kw_only=True)
class ComparisonJob:
    """A comparison, which is checked when it is made; :func:`compare` says what it does.

    Attributes:
        models: those that are compared, in order.
        texts: as for :func:`compare`; so are all others that have its names.
        eval_texts: texts that report.
        sizes: how many layers are to go.
        criteria: names, or criteria of the caller's own; all by default.
        judge: what chooses.
        options: a file of items, of the judge ``options``.
        tokens: length of texts, and how many make one forward.
        max_texts: calibration texts that are read.
        max_eval_texts: held-out texts that are read.
        seed: of whatever is drawn.
        half_blocks: judge halves of layers, too.
        spill: a folder for states that cuts share.
        out: the folder for the results.
        overwrite: replace what is there.
        cache: of what was measured before.
        progress: bars with ETA on standard error.

    Raises:
        CriterionError, LayersError, TextsError, OutputError, ProcessesError: as :func:`compare`.
    """

    models: "Sequence[ModelSource | InMemory]"
    texts: "Iterable[str] | Mapping[str, Iterable[str]]"
    eval_texts: Iterable[str]
    sizes: Sequence[int] = SIZES
    criteria: "Sequence[str | Criterion] | None" = None
    judge: str = "loss"
    options: str | Path | None = None
    tokens: Tokens = field(default_factory=Tokens)
    max_texts: int = MAX_TEXTS
    max_eval_texts: int = MAX_EVAL_TEXTS
    seed: int = 0
    half_blocks: bool = False
    spill: Path | None = None
    out: Path | None = None
    overwrite: bool = False
    cache: Cache = field(default_factory=lambda: Cache(None))
    progress: bool | None = None

    def __post_init__(self) -> None:
        refuse_several("comparisons are")
        if not self.models:
            raise ModelError("there is no model to compare criteria on: name one or several")
        names = [str(model) for model in self.models]
        if len(set(names)) < len(names):
            raise ModelError(f"a model is named twice: {', '.join(names)}")
        if not self.sizes or min(map(layer_number, self.sizes)) < 1:
            raise LayersError("expected sizes of at least 1 layer (n, --n)")
        if (self.options is not None) != (self.judge == "options"):
            raise CriterionError(
                "the judge options needs a file of items, and no other judge takes one "
                "(judge and options, --judge options and --options)"
            )
        _ = self.splits, self.items
        if self.known is None:
            _ = self.chosen
        if self.out is not None and not self._is_there():
            check_free(self.out / COMPARISON_FILE, self.overwrite)

    @cached_property
    def splits(self) -> "dict[str, Splits]":
        """The three sets of texts, by the name of the calibration texts."""
        from ..judgement.splits import three_splits

        report = _first(self.eval_texts, self.max_eval_texts)
        named = self.texts if isinstance(self.texts, Mapping) else {"texts": self.texts}
        return {
            name: three_splits(_first(texts, self.max_texts), report, seed=self.seed)
            for name, texts in named.items()
        }

    @cached_property
    def items(self) -> tuple[list[OptionItem], list[OptionItem]]:
        """The items that choose and those that report; none but for the judge ``options``."""
        from ..judgement.splits import two_splits

        if self.options is None:
            return [], []
        return two_splits(read_options(self.options), seed=self.seed)

    @cached_property
    def inputs(self) -> dict[str, Any] | None:
        """All that the comparison depends on, for the cache; None where that is not known."""
        models = [*self._of_models.values()]
        names = None if self.criteria is None else [*self.criteria]
        if None in models or not all(isinstance(name, str) for name in names or ()):
            return None
        return {
            "models": models, "texts": self._identities(), "criteria": names, "judge": self.judge,
            "n": sorted(set(self.sizes)), "seed": self.seed, "half_blocks": self.half_blocks,
        }  # fmt: skip

    @cached_property
    def entry(self) -> Entry | None:
        """The entry of the cache that holds the comparison, if there is one."""
        return self.cache.find("comparison", self.inputs)

    @cached_property
    def known(self) -> CriteriaComparison | None:
        """The comparison, if the cache has it."""
        return None if self.entry is None else CriteriaComparison.from_json(self.entry.value)

    def run(self) -> CriteriaComparison:
        """Compare, or give what the cache has; the results are written as they are found.

        Returns:
            The comparison, which is in ``out``.

        Raises:
            ModelError, LayersError, OutputError, CacheError: as :func:`compare`.
        """
        comparison = self.known
        if comparison is None:
            comparison = self._measure()
            if not comparison.failures:
                self.cache.put("comparison", self.inputs, comparison.to_json())
        self._write(comparison)
        return comparison

    @cached_property
    def chosen(self) -> "tuple[Criterion, ...]":
        """The criteria that take part."""
        from ..judgement.criteria import criteria as table
        from ..judgement.judges import JUDGES

        if self.judge not in JUDGES:
            raise CriterionError(
                f"unknown judge {self.judge!r}: expected one of {', '.join(JUDGES)} "
                f"(judge, --judge)"
            )
        asked = [*table] if self.criteria is None else self.criteria
        unknown = [name for name in asked if isinstance(name, str) and name not in table]
        if unknown or not asked:
            raise CriterionError(
                f"unknown criterion {', '.join(map(repr, unknown))}: expected some of "
                f"{', '.join(table)} (criteria, --criteria)"
            )
        chosen = tuple(table[name] if isinstance(name, str) else name for name in asked)
        names = [criterion.name for criterion in chosen]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise CriterionError(f"named twice: {', '.join(twice)} (criteria, --criteria)")
        return chosen

    def _measure(self) -> CriteriaComparison:
        outcomes: list[Outcome] = []
        failures: dict[str, str] = {}
        for model in self.models:
            try:
                outcomes.append(self._measure_one(model))
            except Exception as error:
                if len(self.models) == 1:
                    raise
                kind = "" if isinstance(error, ShallowerError) else f"{type(error).__name__}: "
                failures[str(model)] = kind + " ".join(str(error).split())
            self._write(self._joined(outcomes, failures))
        return self._joined(outcomes, failures)

    def _measure_one(self, model: ModelSource | InMemory) -> "Outcome":
        from ..judgement.comparing import Terms, compare_on
        from ..models.decoder import Decoder

        terms = Terms(
            self.chosen, sorted(set(self.sizes)), self.splits, self._identities(),
            judge=self.judge, choosing=self.items[0], reporting=self.items[1], tokens=self.tokens,
            seed=self.seed, halves=self.half_blocks, spill=self.spill,
            progress=self.progress,
        )  # fmt: skip
        store = _Store(self.cache, self._of_models[str(model)])
        loaded, tokenizer = model.load()
        return compare_on(Decoder.of(loaded), tokenizer, terms, name=str(model), store=store)

    def _joined(
        self, outcomes: "Sequence[Outcome]", failures: Mapping[str, str]
    ) -> CriteriaComparison:
        """What is known so far."""
        from ..judgement.judges import JUDGES

        several = len(self.models) > 1
        return CriteriaComparison(
            models=tuple(outcome.model for outcome in outcomes),
            rows=tuple(row for outcome in outcomes for row in outcome.rows),
            failures=dict(failures),
            skipped={
                f"{name} of {outcome.model.name}" if several else name: why
                for outcome in outcomes
                for name, why in outcome.skipped.items()
            },
            judge=self.judge,
            unit=JUDGES[self.judge].unit,
            splits=self._sizes_of_sets(),
            half_blocks=tuple(half for outcome in outcomes for half in outcome.half_blocks),
        )

    def _sizes_of_sets(self) -> dict[str, int]:
        splits = next(iter(self.splits.values()))
        return {
            "fit": len(splits.fit),
            "choose": len(self.items[0]) or len(splits.choose),
            "report": len(splits.report),
        }

    def _write(self, comparison: CriteriaComparison) -> None:
        if self.out is None:
            return
        from ..reporting.comparison import write_csv
        from ..reporting.comparison_figures import draw_comparison

        content = json.dumps(comparison.to_json(), indent=2) + "\n"
        write_file(self.out / COMPARISON_FILE, content.encode())
        write_csv(comparison, self.out / COMPARISON_TABLE)
        try:
            draw_comparison(comparison, self.out)
        except MissingExtraError as error:
            warnings.warn(str(error), stacklevel=2)

    def _is_there(self) -> bool:
        """Whether ``out`` holds this very comparison already."""
        if self.out is None or self.known is None:
            return False
        try:
            content = (self.out / COMPARISON_FILE).read_bytes()
            return bool(json.loads(content) == self.known.to_json())
        except (OSError, ValueError, RecursionError):
            return False

    @cached_property
    def _of_models(self) -> dict[str, dict[str, Any] | None]:
        """All that the results of each model depend on, by its name; the hub is asked once."""
        return {
            str(model): model_inputs(model, self.cache)
            if isinstance(model, ModelSource)
            else model.inputs(self.cache)
            for model in self.models
        }

    def _identities(self) -> dict[str, str]:
        """What tells the texts from others, by the names of the calibration texts."""
        items = [options_fingerprint(part) for part in self.items]
        report = next(iter(self.splits.values())).report
        return {"": _digest(report, asdict(self.tokens), items[1])} | {
            name: _digest(splits.fit, splits.choose, asdict(self.tokens), items[0])
            for name, splits in self.splits.items()
        }


@dataclass(frozen=True, slots=True)
class _Store:
    """The results of one model in the cache."""

    cache: Cache
    model: Mapping[str, Any] | None

    def get(self, kind: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        return self.cache.get(kind, self._all(inputs))

    def put(self, kind: str, inputs: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        self.cache.put(kind, self._all(inputs), value)

    def journal(self, kind: str, inputs: Mapping[str, Any]) -> Journal | None:
        return self.cache.journal(kind, self._all(inputs))

    def _all(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        return None if self.model is None else {**self.model, "of": dict(inputs)}


def _first(texts: Iterable[str], most: int) -> list[str]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TextsError(f"texts must be an iterable of strings, got {type(texts).__name__}")
    return list(islice(texts, most))


def _told(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Tell a tokenizer by all that it is made of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return _digest(type(tokenizer).__name__, rules, repr(tokenizer.init_kwargs))


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
