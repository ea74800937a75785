"""Criteria compared by benchmark, on one model or several, into a folder."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import (
    CacheError,
    CriterionError,
    ExpertsError,
    MissingExtraError,
    ModelError,
    OutputError,
    one_sentence,
)
from ..models.source import ModelSource
from ..processes import refuse_several
from ..progress import whole
from ..store.given_models import InMemory, ModelStore, given_models
from ..store.store import Entry, open_store
from ..texts.prompts import Prompt, prompts_fingerprint
from ..values.comparison import CriteriaComparison
from ..values.experts import check_counts
from ..values.files import COMPARISON_FILE, COMPARISON_TABLE
from ..values.hashing import hash_of
from ..values.layers import check_sizes
from ..values.provenance import versions
from ..values.settings import CompareSettings
from .items import Items, items_fingerprint, judged_items
from .study import SINGLE_LAYERS, WHOLE, Part, Study, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..judgement.criterion import Criterion
    from .compare_rows import Outcome, PartsMaker


def compare(
    model: "PreTrainedModel | ModelSource | str | Path | Sequence[ModelSource | str | Path]",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: "Iterable[str] | Mapping[str, Iterable[str]]" = (),
    eval_texts: Iterable[str] = (),
    *,
    settings: CompareSettings | None = None,
    out: str | Path | None = None,
    cache: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> CriteriaComparison:
    """Compare criteria by what they remove and what that costs.

    The calibration texts are divided into calibration and selection texts; the held-out
    texts give every loss that is reported, and no criterion sees them. Every choice is
    measured before and after a quick patch (the last matrix of the feed-forward before each
    block, solved anew). Each criterion is charged what it costs by itself, although nothing is
    done twice.

    What was measured is kept in the cache, also of a comparison that was cut short, and is not
    measured again.

    Args:
        model: a causal language model of transformers; or the source or the place that it is
            loaded from; or several such, which are compared one after the other. The failure of
            one of several is recorded, and the others go on. If its layers are streamed, all cuts
            are measured in the same passes.
        tokenizer: the tokenizer of a model in memory.
        texts: calibration texts; or several such by name, each of which chooses for itself.
        eval_texts: held-out texts. Calibration texts that are among them are left out.
        settings: the settings; by default those of :class:`CompareSettings`.
        out: a folder for ``comparison.json``, ``comparison.csv`` and the figures.
        cache: keep what is measured, and reuse cached results.
        overwrite: replace what is in ``out``.
        progress: bars with ETA on standard error; by default if that is a terminal.
        options: settings by keyword, as ``n=[2]``: any field of :class:`CompareSettings`.

    Returns:
        A row for every model, calibration text, criterion and ``n``.

    Raises:
        SettingsError: there is no such setting.
        CriterionError: a criterion or judge that does not exist, or is named twice.
        LayersError: a size that the model cannot lose.
        TextsError: too few texts for three sets, too few items or prompts, or broken ones.
        ModelError: the one model that there is cannot be loaded or run; or, by the judge
            ``speech``, cannot generate text, or has its layers on disk.
        OutputError: ``out`` holds another comparison, or cannot be written to.
        CacheError: what the cache holds is damaged.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> done = sh.compare(
        ...     model, tokenizer, texts, held_out, n=[2], criteria=["angular", "deepest"]
        ... )
        >>> [(row.criterion, row.n, len(row.dropped)) for row in done.rows]
        [('angular', 2, 2), ('deepest', 2, 2)]
    """
    refuse_several("comparisons are")
    study = CompareStudy(
        models=given_models(model, tokenizer),
        texts=texts,
        eval_texts=eval_texts,
        settings=CompareSettings.of(settings, options),
        out=None if out is None else Path(out),
        overwrite=overwrite,
        store=open_store(not cache),
        progress=progress,
    )
    return study.run()


@dataclass(frozen=True, kw_only=True)
class CompareStudy(Study[CompareSettings]):
    """A comparison of criteria, which is checked when it is made.

    ``found`` is when each result was measured that the store had; filled by :meth:`run`.
    """

    KIND = "compare"
    SETTINGS = CompareSettings
    RESULTS = COMPARISON_FILE
    leaves = (COMPARISON_FILE, COMPARISON_TABLE)

    found: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ModelError("there is no model to compare criteria on: name one or several")
        names = [str(model) for model in self.models]
        if len(set(names)) < len(names):
            raise ModelError(f"a model is named twice: {', '.join(names)}")
        if len(names) == 1 and not self.by_experts:
            check_sizes(self.settings.n, self.model.count_layers())
        _ = self.splits, self.items
        if self.entry is None:
            _ = self.criteria
        self.check()

    def check_kind(self) -> None:
        """Refuse what cannot be, before anything is loaded; of several models the others go on."""
        if self.prompts:
            way_out = "leave out how the cuts speak (speech, --speech)"
            self.refuse_on_disk("every token of an answer", way_out)
        if len(self.models) == 1 and self.entry is None and self.by_experts:
            check_counts(self.settings.n, self.model.count_experts())

    @property
    def by_experts(self) -> bool:
        """Whether experts go, and not layers."""
        return self.settings.unit == "experts"

    @cached_property
    def items(self) -> tuple[Items, Items]:
        """The selection and test items, of the judges ``options`` and ``speech``."""
        of = self.settings
        return judged_items(of.judge, options=of.options, prompts=of.prompts, seed=of.seed)

    @cached_property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts on which bare cuts speak; the test prompts of the judge ``speech``."""
        if not self.settings.speech:
            return ()
        if self.settings.judge == "speech":
            return cast(Sequence[Prompt], self.items[1])
        return super().prompts

    def more_inputs(self) -> dict[str, Any]:
        """The prompts on which cuts speak."""
        return {"prompts": prompts_fingerprint(self.prompts)}

    @property
    def judges(self) -> tuple[str, str]:
        """The judge that is asked for chooses and scores."""
        return self.settings.judge, self.settings.judge

    @cached_property
    def fitted(self) -> dict[str, str]:
        """Hashes of the calibration and selection texts and the selection items, by name."""
        items = items_fingerprint(self.settings.judge, self.items[0])
        tokens = asdict(self.settings.tokens)
        return {
            name: hash_of([splits.fit, splits.choose, tokens, items])
            for name, splits in self.splits.items()
        }

    @cached_property
    def reported(self) -> str:
        """A hash of the texts and of the test items."""
        tokens = asdict(self.settings.tokens)
        items = items_fingerprint(self.settings.judge, self.items[1])
        return hash_of([self.split.report, tokens, items])

    @cached_property
    def criteria(self) -> "tuple[Criterion, ...]":
        """The criteria that take part."""
        from ..judgement.criteria import criteria, expert_criteria
        from ..judgement.criterion import Criterion
        from ..judgement.judges import JUDGES

        judge, given = self.settings.judge, self.settings.criteria
        if judge not in JUDGES:
            raise CriterionError(
                f"unknown judge {judge!r}: expected one of {', '.join(JUDGES)} (judge, --judge)"
            )
        table = expert_criteria if self.by_experts else criteria
        wanted = [*table] if given is None else [*given]
        strange = (one for one in wanted if self.by_experts or isinstance(one, str))
        unknown = [one for one in strange if one not in table]
        if unknown or not wanted:
            error, of = (ExpertsError, " of experts") if self.by_experts else (CriterionError, "")
            raise error(
                f"unknown criterion{of} {', '.join(map(repr, unknown))}: expected some of "
                f"{', '.join(table)} (criteria, --criteria)",
                see=None if self.by_experts else "criterion",
            )
        chosen = tuple(table[name] if isinstance(name, str) else name for name in wanted)
        for criterion in chosen:
            name = getattr(criterion, "name", None)
            if not isinstance(criterion, Criterion) or not isinstance(name, str) or not name:
                raise CriterionError(
                    f"{criterion!r} is no criterion: expected an object of a class made from "
                    f"shallower.Criterion, with a name"
                )
        return chosen

    def units(self) -> list[Unit]:
        """List the choices of every criterion, by model and texts."""
        return [
            self.unit(
                one.name,
                n,
                "cut" if self.by_experts else "cut and patched",
                model=str(model),
                texts=texts,
            )
            for model in self.models
            for texts in self.splits
            for one in self.criteria
            for n in self.settings.n
        ]

    def parts(self) -> list[Part[CompareSettings]]:
        """List the whole models, and the criteria on each with all their sizes: searches first."""
        from ..judgement.criterion import has_costs

        (first, *_), settings = self.splits, self.settings
        truth = settings.truth and any(map(has_costs, self.criteria))
        of_none = [WHOLE, SINGLE_LAYERS][: 1 + truth]
        bare = replace(settings, criteria=())
        return [
            *(Part(what, str(model), first, bare) for what in of_none for model in self.models),
            *(
                Part(one.name, str(model), texts, replace(settings, criteria=(one.name,)))
                for one in sorted(self.criteria, key=has_costs)
                for model in self.models
                for texts in self.splits
            ),
        ]

    def maker(self) -> "PartsMaker":
        """Give the function that measures a part."""
        from .compare_rows import PartsMaker

        return PartsMaker(self, self.criteria)

    def is_stock(self) -> bool:
        """Whether all criteria are of this package; a model that is not known has no results."""
        from ..judgement.criteria import BUILT_IN, criteria, is_built_in

        names = [criterion.name for criterion in BUILT_IN]
        is_named = self.by_experts or self.settings.criteria is not None
        whole = is_named or [*criteria] == names
        return whole and all(map(is_built_in, self.criteria))

    def _chooses_by(self) -> dict[str, Any]:
        return {**super()._chooses_by(), "fit": "all", "unit": self.settings.unit}

    @cached_property
    def entry(self) -> Entry | None:
        """The whole comparison in the store; a model that is not known has none."""
        return None if None in self.of_models.values() else super().entry

    def run(self) -> CriteriaComparison:
        """Compare, or give what is known; results are written as they are found.

        Raises as :func:`compare`.
        """
        with self.alone():
            comparison = self._measure() if self.entry is None else _read(self.entry)
            self.say_read()
            self.write_comparison(comparison)
        return comparison

    def _measure(self) -> CriteriaComparison:
        settings = self.settings
        each = len(self.criteria) * (1 + len(settings.n)) + 1 + settings.truth
        with whole("compare", len(self.models) * (1 + len(self.splits) * each), self.progress):
            return self._measured()

    def _measured(self) -> CriteriaComparison:
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
                self.write_comparison(self._joined(outcomes, failures))
        comparison = self._joined(outcomes, failures)
        if not failures and all(outcome.is_complete for outcome in outcomes):
            self.store.put(self.KIND, self.inputs, comparison.to_json())
        return comparison

    def _measure_one(self, model: ModelSource | InMemory) -> "Outcome":
        from ..memory.budget import limit
        from .compare_rows import compare_on

        store = ModelStore(self.store, self.of_models[str(model)], self.found)
        with limit(self.settings.device_memory):
            return compare_on(self, model, criteria=self.criteria, store=store)

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
            judge=self.settings.judge,
            unit=JUDGES[self.settings.judge].unit,
            splits=dict(outcomes[0].splits) if outcomes else {},
            max_length=self.settings.max_length,
            versions=versions(),
        )

    def write_comparison(self, comparison: CriteriaComparison) -> None:
        """Write the comparison as far as it is known, its table and its figures."""
        if self.out is None:
            return
        from ..reporting.charts.comparison import draw_comparison
        from ..reporting.writers.csv import write_comparison

        self.write(comparison.to_json())
        write_comparison(comparison, self.out / COMPARISON_TABLE)
        try:
            draw_comparison(comparison, self.out)
        except MissingExtraError as error:
            warnings.warn(str(error), stacklevel=2)


def _read(entry: Entry) -> CriteriaComparison:
    return CriteriaComparison.from_json(entry.value)
