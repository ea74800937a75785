"""A comparison of criteria: checked before anything is loaded, resumed, known by the cache."""

import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    CacheError,
    CriterionError,
    LayersError,
    MissingExtraError,
    ModelError,
    OutputError,
    TextsError,
)
from ..models.source import ModelSource
from ..processes import refuse_several
from ..storage import check_free, write_file
from ..texts.options import OptionItem, options_fingerprint, read_options
from ..values.comparison import CriteriaComparison
from ..values.files import COMPARISON_FILE, COMPARISON_TABLE
from ..values.hashing import hash_of
from ..values.layers import layer_number
from ..values.provenance import versions
from ..values.tokens import Tokens
from .given_models import InMemory, ModelStore, inputs_of_one
from .store import Entry, Store

if TYPE_CHECKING:
    from ..judgement.comparing import Outcome
    from ..judgement.criterion import Criterion
    from ..texts.splits import Splits

MAX_TEXTS = 80
"""Calibration texts by default: 64 that fit, and 16 that choose."""

MAX_EVAL_TEXTS = 64
"""Texts that report, by default."""

SIZES = (1, 2, 4, 8)

_TABLE = "shallower.judgement.criteria"


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
        out: the folder for the results.
        overwrite: replace what is there.
        cache: of what was measured before.
        command: the words on the command line that asked, without places; empty if none did.
        progress: bars with ETA on standard error.
        found: when each result was measured that the cache had; filled by :meth:`run`.

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
    out: Path | None = None
    overwrite: bool = False
    cache: Store = field(default_factory=lambda: Store(None))
    command: str = ""
    progress: bool | None = None
    found: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        refuse_several("comparisons are")
        self._check_models()
        if isinstance(self.criteria, str):
            raise CriterionError(f"criteria must be a sequence of names, got {self.criteria!r}")
        if isinstance(self.sizes, int | str) or not list(self.sizes):
            raise LayersError(f"expected sizes, as 1,2,4, got {self.sizes!r} (n, --n)")
        object.__setattr__(self, "sizes", sorted({layer_number(size) for size in self.sizes}))
        if self.sizes[0] < 1:
            raise LayersError("expected sizes of at least 1 layer (n, --n)")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise CriterionError(f"seed {self.seed!r}: expected an integer from 0 on (--seed)")
        if (self.options is not None) != (self.judge == "options"):
            raise CriterionError(
                "the judge options needs a file of items, and no other judge takes one "
                "(judge and options, --judge options and --options)"
            )
        _ = self.splits, self.items
        if self.criteria is not None:
            _refuse_twice([str(getattr(one, "name", one)) for one in self.criteria])
        if self.known is None:
            _ = self.chosen
        if self.out is not None and not self._is_own(self.out / COMPARISON_FILE):
            for name in (COMPARISON_FILE, COMPARISON_TABLE):
                check_free(self.out / name, self.overwrite)

    def _check_models(self) -> None:
        if not self.models:
            raise ModelError("there is no model to compare criteria on: name one or several")
        names = [str(model) for model in self.models]
        if len(set(names)) < len(names):
            raise ModelError(f"a model is named twice: {', '.join(names)}")

    @cached_property
    def splits(self) -> "dict[str, Splits]":
        """The three sets of texts, by the name of the calibration texts."""
        from ..texts.splits import three_splits

        report = _first(self.eval_texts, self.max_eval_texts)
        named = self.texts if isinstance(self.texts, Mapping) else {"texts": self.texts}
        if not named or not all(isinstance(name, str) and name for name in named):
            raise TextsError(f"texts by name: expected names that are not empty, got {[*named]}")
        return {
            name: three_splits(_first(texts, self.max_texts), report, seed=self.seed)
            for name, texts in named.items()
        }

    @cached_property
    def items(self) -> tuple[list[OptionItem], list[OptionItem]]:
        """The items that choose and those that report; none but for the judge ``options``."""
        from ..texts.splits import two_splits

        if self.options is None:
            return [], []
        return two_splits(read_options(self.options), seed=self.seed)

    @cached_property
    def inputs(self) -> dict[str, Any] | None:
        """All that the comparison depends on, for the cache; None where that is not known."""
        return self._asked if self._asked and None not in self._asked["models"] else None

    @cached_property
    def _asked(self) -> dict[str, Any] | None:
        """All that is asked; None where the cache is off, or a criterion is not of this package."""
        if self.cache.folder is None or not self._is_stock():
            return None
        return {
            "models": [*self._of_models.values()],
            "names": [str(model) for model in self.models],
            "texts": [list(pair) for pair in self._identities.items()],
            "reported": self._reported,
            "criteria": self.criteria and [str(getattr(c, "name", c)) for c in self.criteria],
            "judge": self.judge,
            "n": list(self.sizes),
            "seed": self.seed,
        }

    def _is_stock(self) -> bool:
        """Whether all criteria are those of this package; nobody has changed an unseen table."""
        if _TABLE not in sys.modules and all(isinstance(c, str) for c in self.criteria or ()):
            return True
        from ..judgement.criteria import BUILT_IN, is_built_in
        from ..judgement.criteria import criteria as table

        names = [criterion.name for criterion in BUILT_IN]
        whole = self.criteria is not None or [*table] == names
        return whole and all(map(is_built_in, self.chosen))

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
        self._write(comparison)
        return comparison

    @cached_property
    def chosen(self) -> "tuple[Criterion, ...]":
        """The criteria that take part."""
        from ..judgement.criteria import criteria as table
        from ..judgement.criterion import Criterion
        from ..judgement.judges import JUDGES

        if self.judge not in JUDGES:
            raise CriterionError(
                f"unknown judge {self.judge!r}: expected one of {', '.join(JUDGES)} "
                f"(judge, --judge)"
            )
        asked = [*table] if self.criteria is None else [*self.criteria]
        unknown = [name for name in asked if isinstance(name, str) and name not in table]
        if unknown or not asked:
            raise CriterionError(
                f"unknown criterion {', '.join(map(repr, unknown))}: expected some of "
                f"{', '.join(table)} (criteria, --criteria)"
            )
        chosen = tuple(table[name] if isinstance(name, str) else name for name in asked)
        for criterion in chosen:
            name = getattr(criterion, "name", None)
            if not isinstance(criterion, Criterion) or not isinstance(name, str) or not name:
                raise CriterionError(
                    f"{criterion!r} is no criterion: expected an object of a class made from "
                    f"shallower.Criterion, with a name"
                )
        _refuse_twice([criterion.name for criterion in chosen])
        return chosen

    def _measure(self) -> CriteriaComparison:
        from ..errors import one_sentence

        outcomes: list[Outcome] = []
        failures: dict[str, str] = {}
        for model in self.models:
            try:
                outcomes.append(self._measure_one(model))
            except (CacheError, OutputError):
                raise
            except Exception as error:
                if len(self.models) == 1:
                    raise
                failures[str(model)] = one_sentence(error)
            if model is not self.models[-1]:
                self._write(self._joined(outcomes, failures))
        comparison = self._joined(outcomes, failures)
        if not failures and all(outcome.is_complete for outcome in outcomes):
            self.cache.put("comparison", self.inputs, comparison.to_json())
        return comparison

    def _measure_one(self, model: ModelSource | InMemory) -> "Outcome":
        from ..judgement.comparing import Terms, compare_on
        from ..models.decoder import Decoder

        terms = Terms(
            self.chosen, self.sizes, self.splits, self._identities, self._reported,
            judge=self.judge, choosing=self.items[0], reporting=self.items[1], tokens=self.tokens,
            seed=self.seed, progress=self.progress,
        )  # fmt: skip
        store = ModelStore(self.cache, self._of_models[str(model)], self.found)
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
            splits=dict(outcomes[0].splits) if outcomes else {},
            max_length=self.tokens.max_length,
            versions=versions(),
        )

    def _write(self, comparison: CriteriaComparison) -> None:
        if self.out is None:
            return
        from ..reporting.charts.comparison import draw_comparison
        from ..reporting.writers.csv import write_comparison

        beside = {"job": self._job, "command": self.command}
        content = json.dumps({**comparison.to_json(), **beside}, indent=2) + "\n"
        write_file(self.out / COMPARISON_FILE, content.encode())
        write_comparison(comparison, self.out / COMPARISON_TABLE)
        try:
            draw_comparison(comparison, self.out)
        except MissingExtraError as error:
            warnings.warn(str(error), stacklevel=2)

    @cached_property
    def _job(self) -> str | None:
        """A hash of all that the comparison depends on; None where that is not known."""
        return None if self._asked is None else self.cache.key("comparison", self._asked)

    def _is_own(self, path: Path) -> bool:
        """Whether a file is of this very comparison, which may have been cut short."""
        try:
            written = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        found = written.get("job") if isinstance(written, dict) else None
        return found is not None and found == self._job

    @cached_property
    def _of_models(self) -> dict[str, dict[str, Any] | None]:
        """All that the results of each model depend on, by its name; the hub is asked once."""
        return {str(model): inputs_of_one(model, self.cache) for model in self.models}

    @cached_property
    def _identities(self) -> dict[str, str]:
        """What tells the texts from others, by the names of the calibration texts."""
        items = options_fingerprint(self.items[0])
        return {
            name: hash_of([splits.fit, splits.choose, asdict(self.tokens), items])
            for name, splits in self.splits.items()
        }

    @cached_property
    def _reported(self) -> str:
        """What tells the texts that report from others."""
        report = next(iter(self.splits.values())).report
        return hash_of([report, asdict(self.tokens), options_fingerprint(self.items[1])])


def _refuse_twice(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise CriterionError(f"named twice: {', '.join(twice)} (criteria, --criteria)")


def _first(texts: Iterable[str], most: int) -> list[str]:
    if most < 1:
        raise TextsError(f"the number of texts must be at least 1, got {most}")
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TextsError(f"texts must be an iterable of strings, got {type(texts).__name__}")
    return list(islice(texts, most))
