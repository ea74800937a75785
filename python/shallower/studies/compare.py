"""Criteria compared by benchmark, on one model or several, into a folder."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import (
    CriterionError,
    ExpertsError,
    ModelError,
    RecipeError,
    ShallowerError,
    TextsError,
    others_go_on,
)
from ..models.source import ModelSource
from ..processes import refuse_several
from ..progress import whole
from ..results.comparison import CriteriaComparison
from ..settings.studies import CRITERIA, EXPERT_CRITERIA, CompareSettings
from ..store.given_models import InMemory, ModelStore, given_models
from ..store.store import Entry, open_store
from ..texts.prompts import Prompt, prompts_fingerprint
from ..values.experts import check_counts
from ..values.files import COMPARISON_FILE, COMPARISON_TABLE
from ..values.layers import check_sizes
from ..values.provenance import LM_EVAL, hash_of, versions
from .study import SINGLE_LAYERS, WHOLE, Items, Part, Study, items_fingerprint, judged_items

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..judgement.criterion import Criterion
    from .compare_rows import Outcome
    from .measures import ScoresOnTasks


def compare(
    model: "PreTrainedModel | ModelSource | str | Path | Sequence[ModelSource | str | Path]",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: "Iterable[str] | Mapping[str, Iterable[str]]" = (),
    eval_texts: Iterable[str] | None = None,
    *,
    settings: CompareSettings | None = None,
    out: str | Path | None = None,
    cache: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> CriteriaComparison:
    """Compare criteria by what they remove and what that costs.

    Texts are divided into calibration and selection texts; every reported number comes from the
    test set, which no criterion sees. Every choice is measured in each of ``states``: as it is
    cut, patched, and healed. Measures are the loss, and tasks and speech on demand. Each criterion
    is charged what it costs by itself, although nothing is done twice.

    Results are cached as they are measured, also those of a comparison that was cut short. A cut
    that cannot be patched or measured is a row that says why.

    Args:
        model: a causal language model of transformers; or the source or the place that it is
            loaded from; or several such, which are compared one after the other. The failure of
            one of several is recorded, and the others go on. If its layers are streamed, all cuts
            are measured in the same passes.
        tokenizer: the tokenizer of a model in memory.
        texts: calibration texts; or several such by name, each of which chooses for itself.
        eval_texts: held-out texts. Calibration texts that are among them are left out. The judge
            ``none`` needs none.
        settings: the settings; by default those of :class:`CompareSettings`.
        out: a folder for ``comparison.json``, written before each next step, and
            ``comparison.csv``.
        cache: keep what is measured, and reuse cached results.
        overwrite: replace what is in ``out``.
        progress: bars with ETA on standard error; by default if that is a terminal.
        options: settings by keyword, as ``n=[2]``: any field of :class:`CompareSettings`.

    Returns:
        A row for every model, calibration text, state, criterion and ``n``.

    Raises:
        SettingsError: there is no such setting.
        CriterionError: a criterion or judge that does not exist, or is named twice.
        LayersError: a size that the model cannot lose.
        PatchError: there is no such state or patch.
        RecipeError: ``heal_steps`` without the state ``healed``, or settings that do not fit.
        TextsError: too few texts for three sets, too few items or prompts, or broken ones; no such
            task.
        ModelError: the one model that there is cannot be loaded or run; or its layers are
            streamed, and there are tasks, speech or the state ``healed``.
        MissingExtraError: the state ``healed`` without peft, or tasks without lm-eval.
        OutputError: ``out`` holds another comparison, or cannot be written to.
        CacheError: what the cache holds is damaged.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> done = sh.compare(
        ...     model, tokenizer, texts, held_out, n=[2], criteria=["angular", "deepest"]
        ... )
        >>> [(row.criterion, row.n, row.state) for row in done.rows]
        [('angular', 2, 'cut'), ('deepest', 2, 'cut'), ('angular', 2, 'patched'),
         ('deepest', 2, 'patched')]
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

    RESULTS = COMPARISON_FILE
    leaves = (COMPARISON_FILE, COMPARISON_TABLE)

    found: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_texts is None and self.settings.judge != "none":
            raise TextsError("--eval-texts is missing: name a test set (eval_texts, --eval-texts)")
        if not self.models:
            raise ModelError("there is no model to compare criteria on: name one or several")
        names = [str(model) for model in self.models]
        if len(set(names)) < len(names):
            raise ModelError(f"a model is named twice: {', '.join(names)}")
        if len(names) == 1 and not self.by_experts:
            check_sizes(self.settings.n, self.model.count_layers())
        self._check_names()
        self._refuse_streams()
        _ = self.splits, self.items
        if self.entry is None:
            _ = self.criteria
        self.check()

    def _refuse_streams(self) -> None:
        """Refuse what reads all layers at every step, of layers that are streamed."""
        settings = self.settings
        if settings.tasks:
            self.refuse_on_disk("a task, for every few items", "leave out tasks (tasks, --tasks)")
        if "healed" in settings.states:
            way_out = "leave out the state healed (states, --states), and heal a cut of it"
            self.refuse_on_disk("a training, at every step", way_out)
        if self.prompts:
            way_out = "leave out how the cuts speak (speech, --speech)"
            self.refuse_on_disk("every token of an answer", way_out)

    def check_kind(self) -> None:
        """Refuse what cannot be, before anything is loaded; of several models the others go on."""
        if "healed" in self.settings.states:
            self._check_healing()
        if len(self.models) == 1 and self.entry is None and self.by_experts:
            check_counts(self.settings.n, self.model.count_experts())

    def _check_healing(self) -> None:
        """Refuse healings that cannot be, before anything is loaded."""
        from ..healing.checks import require_peft

        require_peft()
        if self.out is None:
            raise RecipeError("the state healed needs a folder: name one (out, --out)")
        if self.settings.heal is not None:
            here = all(isinstance(model, ModelSource) for model in self.models)
            self.settings.heal.check(original=here)

    @cached_property
    def tasks(self) -> "ScoresOnTasks | None":
        """The tasks that every cut is measured on."""
        from .measures import ScoresOnTasks

        settings = self.settings
        return ScoresOnTasks(settings.tasks, settings, False) if settings.tasks else None

    @property
    def by_experts(self) -> bool:
        """Whether experts go, and not layers."""
        return self.settings.unit == "experts"

    @cached_property
    def items(self) -> tuple[Items, Items]:
        """The selection and test items, of the judges ``options`` and ``speech``."""
        of = self.settings
        return judged_items(self.judges[0], options=of.options, prompts=of.prompts, seed=of.seed)

    @cached_property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts on which cuts speak; the test prompts of the judge ``speech``."""
        if not self.settings.speech:
            return ()
        if self.settings.judge == "speech":
            return cast(Sequence[Prompt], self.items[1])
        return super().prompts

    def more_inputs(self) -> dict[str, Any]:
        """The tasks, the prompts, and the texts that are trained on."""
        healed = "healed" in self.settings.states
        return {
            "tasks": self.tasks and self.tasks.key(self.store),
            "prompts": prompts_fingerprint(self.prompts),
            "trained_on": self.trained_on() if healed else None,
        }

    def shared_settings(self) -> CompareSettings:
        """The settings without what is trained, which is known by the whole study alone."""
        states = tuple(state for state in self.settings.states if state != "healed") or ("cut",)
        return replace(self.settings, states=states, heal=None, heal_steps=None)

    @property
    def judges(self) -> tuple[str, str]:
        """The judge that is asked for chooses and scores; by ``none`` neither is done."""
        judge = "loss" if self.settings.judge == "none" else self.settings.judge
        return judge, judge

    @cached_property
    def fitted(self) -> dict[str, str]:
        """Hashes of the calibration and selection texts and the selection items, by name."""
        items = items_fingerprint(self.judges[0], self.items[0])
        tokens = asdict(self.settings.tokens)
        return {
            name: hash_of([splits.fit, splits.choose, tokens, items])
            for name, splits in self.splits.items()
        }

    @cached_property
    def reported(self) -> str:
        """A hash of the texts and of the test items."""
        tokens = asdict(self.settings.tokens)
        items = items_fingerprint(self.judges[0], self.items[1])
        return hash_of([self.split.report, tokens, items])

    @cached_property
    def criteria(self) -> "tuple[Criterion, ...]":
        """The criteria that take part."""
        from ..judgement.criteria import NAMED, criteria, expert_criteria
        from ..judgement.criterion import Criterion
        from ..judgement.judges import JUDGES

        judge, given = self.settings.judge, self.settings.criteria
        if judge not in (*JUDGES, "none"):
            raise CriterionError(
                f"unknown judge {judge!r}: expected one of {', '.join(JUDGES)} or none "
                f"(judge, --judge)"
            )
        table = expert_criteria if self.by_experts else criteria
        wanted = [*table] if given is None else [*given]
        table = table if self.by_experts else {**table, **NAMED}
        strange = (one for one in wanted if self.by_experts or isinstance(one, str))
        unknown = [one for one in strange if one not in table]
        if unknown or not wanted:
            raise self._unknown(unknown, table)
        chosen = tuple(table[name] if isinstance(name, str) else name for name in wanted)
        for criterion in chosen:
            name = getattr(criterion, "name", None)
            if not isinstance(criterion, Criterion) or not isinstance(name, str) or not name:
                raise CriterionError(
                    f"{criterion!r} is no criterion: expected an object of a class made from "
                    f"shallower.Criterion, with a name"
                )
        return chosen

    def _check_names(self) -> None:
        """Refuse a name that is no criterion before torch is imported, and a table with it."""
        if "shallower.judgement.criteria" in sys.modules:
            return
        names = EXPERT_CRITERIA if self.by_experts else CRITERIA
        given = (one for one in self.settings.criteria or () if isinstance(one, str))
        if unknown := [name for name in given if name not in names]:
            raise self._unknown(unknown, names)

    def _unknown(self, unknown: Sequence[Any], names: Iterable[str]) -> ShallowerError:
        error, of = (ExpertsError, " of experts") if self.by_experts else (CriterionError, "")
        return error(
            f"unknown criterion{of} {', '.join(map(repr, unknown))}: expected some of "
            f"{', '.join(names)} (criteria, --criteria)",
            see=None if self.by_experts else "criterion",
        )

    def units(self) -> list[str]:
        """Name the choices of every criterion, by model and texts."""
        return [
            self.unit(one.name, n, state, model=str(model), texts=texts)
            for model in self.models
            for texts in self.splits
            for state in self.settings.states
            for one in self.criteria
            for n in self.settings.n
        ]

    def parts(self) -> list[Part]:
        """List the whole models, and the criteria on each with all their sizes: searches first."""
        from ..judgement.criterion import has_costs
        from .compare_rows import wants_scans

        (first, *_), settings = self.splits, self.shared_settings()
        bare = replace(settings, criteria=())
        whole = self.splits if wants_scans(self) else (first,)
        found = [Part(WHOLE, str(model), texts, bare) for model in self.models for texts in whole]
        if settings.judge == "none":
            return found
        truth = settings.truth and any(map(has_costs, self.criteria))
        return [
            *found,
            *(Part(SINGLE_LAYERS, str(model), first, bare) for model in self.models if truth),
            *(
                Part(one.name, str(model), texts, replace(settings, criteria=(one.name,)))
                for one in sorted(self.criteria, key=has_costs)
                for model in self.models
                for texts in self.splits
            ),
        ]

    def part_inputs(self, part: Part) -> dict[str, Any]:
        """All that the measurements of a part depend on, of a study whose inputs are known."""
        assert self.inputs is not None
        return {
            **self.inputs,
            "models": self.of_models[part.model],
            "texts": self.fitted[part.texts],
            "settings": part.settings.to_json(),
            "trained_on": None,
            "part": part.what,
        }

    def maker(self) -> Callable[[Part], None]:
        """Give the function that measures a part."""
        from .compare_rows import parts_maker

        return parts_maker(self, self.criteria, self.tasks)

    def is_stock(self) -> bool:
        """Whether all criteria are of this package, and the one model is known; of several those
        that are not have no results.
        """
        from ..judgement.criteria import BUILT_IN, criteria, is_built_in

        names = [criterion.name for criterion in BUILT_IN]
        is_named = self.by_experts or self.settings.criteria is not None
        whole = is_named or [*criteria] == names
        is_known = len(self.models) > 1 or super().is_stock()
        return is_known and whole and all(map(is_built_in, self.criteria))

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
        from .compare_rows import wants_scans

        settings = self.settings
        each = len(self.criteria) * (1 + len(settings.n) * len(settings.states))
        each = (each + 1 + settings.truth) * (settings.judge != "none") + wants_scans(self)
        steps = len(self.models) * (1 + len(self.splits) * each)
        with whole(settings.COMMAND, steps, self.progress):
            return self._measured()

    def _measured(self) -> CriteriaComparison:
        outcomes: list[Outcome] = []
        failures: dict[str, str] = {}
        for model in self.models:
            is_one = len(self.models) == 1
            with nullcontext() if is_one else others_go_on(str(model), failures):
                outcomes.append(self._measure_one(model, outcomes, failures))
            if model is not self.models[-1]:
                self.write_comparison(self._joined(outcomes, failures, ended=False))
        comparison = self._joined(outcomes, failures)
        if not failures and all(outcome.is_complete for outcome in outcomes):
            self.store.put("study", self.inputs, comparison.to_json())
        return comparison

    def _measure_one(
        self,
        model: ModelSource | InMemory,
        before: "Sequence[Outcome]",
        failures: Mapping[str, str],
    ) -> "Outcome":
        from ..memory.budget import limit
        from .compare_rows import compare_on

        store = ModelStore(self.store, self.of_models[str(model)], self.found)
        with limit(self.settings.device_memory):
            return compare_on(
                self,
                model,
                criteria=self.criteria,
                tasks=self.tasks,
                store=store,
                write=lambda found: self.write_comparison(
                    self._joined([*before, found], failures, ended=False)
                ),
            )

    def _joined(
        self, outcomes: "Sequence[Outcome]", failures: Mapping[str, str], *, ended: bool = True
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
            unit=JUDGES[self.judges[0]].unit,
            splits=dict(outcomes[0].splits) if outcomes else {},
            max_length=self.settings.max_length,
            versions=versions(LM_EVAL) if self.settings.tasks else versions(),
            settings=self._shown(),
            ended=ended,
        )

    def _shown(self) -> dict[str, Any]:
        """The settings that are shown beside the figures."""
        settings = self.settings
        drawn = ("max_items", "num_shots", "pass_at")
        return {
            "n": list(settings.n),
            "criteria": [criterion.name for criterion in self.criteria],
            "states": list(settings.states),
            "patch": settings.patch if {*settings.states} != {"cut"} else None,
            "patch_tokens": settings.patch_tokens if settings.patch == "full" else None,
            "heal_steps": settings.heal_steps,
            "tasks": {"names": [*settings.tasks], **{one: getattr(settings, one) for one in drawn}},
            "top": settings.top,
            "seed": settings.seed,
        }

    def write_comparison(self, comparison: CriteriaComparison) -> None:
        """Write the comparison as far as it is known, and its table."""
        if self.out is None:
            return
        from ..reporting.writers.csv import write_comparison

        self.write(comparison.to_json())
        write_comparison(comparison, self.out / COMPARISON_TABLE)


def _read(entry: Entry) -> CriteriaComparison:
    return CriteriaComparison.from_json(entry.value)
