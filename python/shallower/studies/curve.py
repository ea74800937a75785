"""What a model loses over the number of layers that go, by strategy and state."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CriterionError
from ..models.source import ModelSource
from ..processes import refuse_several
from ..progress import say_goes_on, stage, whole
from ..reporting.writers.csv import write_curve
from ..store.given_models import given_model
from ..store.store import open_store
from ..texts.prompts import prompts_fingerprint
from ..values.curve import OWN_STRATEGIES, Curve
from ..values.files import CURVE_FILE, CURVE_TABLE, PARTIAL_FILE, SCAN_FILE
from ..values.layers import check_sizes
from ..values.settings import CurveSettings
from .study import WHOLE, Part, Study, Unit
from .tasks import StudyTasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..values.recipe import Recipe
    from .curve_points import CurvePoints


def curve(
    model: "PreTrainedModel | ModelSource | str | Path",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: Iterable[str] = (),
    *,
    eval_texts: Iterable[str],
    out: str | Path,
    settings: CurveSettings | None = None,
    cache: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> Curve:
    """Measure what a model loses as more and more of its layers go.

    For every size and strategy the cut is measured as it is, patched, and healed: its loss on
    the test set, and tasks. The model is loaded once and cut in memory; cuts that two
    strategies have in common are measured once; it is as before afterwards. Some of the texts
    fit, some choose, and others report, as in :func:`run`: no figure is of a text that anything
    was chosen by.

    Leaves in ``out`` ``curve.json``, which is written before each next step, ``curve.csv``, and
    the scan where a strategy looks at one. A curve that was cut short goes on when it is called
    again with the same arguments. A cut that cannot be chosen, patched or measured is a point
    that says why.

    Args:
        model: a causal language model of transformers, or the source or the place that it is
            loaded from. If its layers are streamed, all cuts are measured in the same passes.
        tokenizer: the tokenizer of a model in memory.
        texts: calibration texts, any iterable of strings, read once.
        eval_texts: held-out texts, which report. Calibration texts that are among them are left
            out.
        out: the folder to write to.
        settings: the settings; by default those of :class:`CurveSettings`.
        cache: keep what is measured, and reuse cached results. Without it, a curve that
            was cut short begins anew.
        overwrite: replace what is in ``out``.
        progress: a bar with ETA on standard error; by default if that is a terminal.
        options: settings by keyword, as ``n=[2, 4]``: any field of :class:`CurveSettings`.

    Returns:
        The curve, which is in ``curve.json`` too.

    Raises:
        SettingsError: there is no such setting.
        LayersError: a size that the model cannot lose, or a number that is out of range.
        CriterionError: there is no such strategy.
        PatchError: there is no such state.
        RecipeError: ``heal_steps`` without the state ``healed``, or settings that do not fit.
        TextsError: no texts, or too few for three sets; no such task.
        OutputError: ``out`` holds another curve, or cannot be written to.
        ModelError: the model cannot be loaded or run; or its layers are streamed, and there are
            tasks or the state ``healed``.
        CacheError: what the cache holds is damaged.
        MissingExtraError: the state ``healed`` without peft, or tasks without lm-eval.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> curve = sh.curve(
        ...     model, tokenizer, texts, eval_texts=held_out, out="curves/tiny", n=[1, 2],
        ...     strategies=["similarity", "deepest"], quick_patch=True,
        ... )
        >>> [(point.n, point.strategy, point.state) for point in curve.points[:3]]
        [(0, 'whole', 'cut'), (1, 'similarity', 'cut'), (1, 'similarity', 'patched')]
        >>> curve.line("deepest", "cut")[1].dropped
        (28,)
    """
    refuse_several("curves are")
    study = CurveStudy(
        models=(given_model(model, tokenizer),),
        texts=texts,
        eval_texts=eval_texts,
        settings=CurveSettings.of(settings, options),
        out=Path(out),
        overwrite=overwrite,
        store=open_store(not cache),
        progress=progress,
    )
    return study.run()


@dataclass(frozen=True, kw_only=True)
class CurveStudy(Study[CurveSettings]):
    """A curve, which is checked when it is made."""

    KIND = "curve"
    SETTINGS = CurveSettings
    RESULTS = CURVE_FILE
    leaves = (CURVE_FILE, CURVE_TABLE, SCAN_FILE, PARTIAL_FILE)

    def __post_init__(self) -> None:
        super().__post_init__()
        foreign = self._foreign
        if foreign or not self.settings.strategies:
            from ..judgement.criteria import criteria

            unknown = [name for name in foreign if name not in criteria]
            if unknown or not self.settings.strategies:
                there = dict.fromkeys((*OWN_STRATEGIES, *criteria))
                raise CriterionError(
                    f"unknown strategy {', '.join(map(repr, unknown))}: expected some of "
                    f"{', '.join(there)} (strategies, --strategies)"
                )

    @property
    def _foreign(self) -> list[str]:
        """The strategies that are criteria."""
        return [name for name in self.settings.strategies if name not in OWN_STRATEGIES]

    def check_kind(self) -> None:
        """Refuse what cannot be, before anything is loaded; as :func:`curve`."""
        if self.settings.tasks:
            self.refuse_on_disk("a task, for every few items", "leave out tasks (tasks, --tasks)")
        if self.prompts:
            way_out = "leave out what it is to say (prompts, --speech)"
            self.refuse_on_disk("every token of an answer", way_out)
        if "healed" in self.settings.states:
            way_out = "leave out the state healed (states, --states), and heal a cut of it"
            self.refuse_on_disk("a training, at every step", way_out)
            from ..healing.checks import require_peft

            require_peft()
            if self.settings.heal is not None:
                self.settings.heal.check(original=isinstance(self.model, ModelSource))
        if self.settings.n:
            check_sizes(self.settings.n, self.model.count_layers())

    def units(self) -> list[Unit]:
        """List the points, the whole model first."""
        of = self.settings
        wanted = product(of.states, of.n, of.strategies)
        return [self.unit("whole", 0, "cut"), *(self.unit(name, n, s) for s, n, name in wanted)]

    def shared_settings(self) -> CurveSettings:
        """The settings without what is trained, which is known by the whole curve alone."""
        states = tuple(state for state in self.settings.states if state != "healed") or ("cut",)
        return replace(self.settings, states=states, heal=None, heal_steps=None)

    def parts(self) -> list[Part[CurveSettings]]:
        """List the whole model, and every strategy with every size: the largest first."""
        bare = self.shared_settings()
        name, (texts,) = str(self.model), self.splits
        found = [Part(WHOLE, name, texts, replace(bare, n=(), strategies=(), states=("cut",)))]
        for n in sorted(bare.n, reverse=True):
            for strategy in bare.strategies:
                one = replace(bare, n=(n,), strategies=(strategy,))
                found.append(Part(f"{strategy}, n = {n}", name, texts, one))
        return found

    def maker(self) -> "Callable[[Part[CurveSettings]], None]":
        """Give the function that measures a part, on the model that it has loaded."""
        return self._points().make

    def is_stock(self) -> bool:
        """Whether all strategies are of this package, and the model is known."""
        if self._foreign:
            from ..judgement.criteria import criteria, is_built_in

            if not all(is_built_in(criteria[name]) for name in self._foreign):
                return False
        return super().is_stock()

    def more_inputs(self) -> dict[str, Any]:
        """The items of the tasks, the prompts, and the texts that are trained on."""
        healed = "healed" in self.settings.states
        return {
            "tasks": self.tasks.identity,
            "prompts": prompts_fingerprint(self.prompts),
            "trained_on": self.trained_on() if healed else None,
        }

    @cached_property
    def tasks(self) -> StudyTasks:
        """The tasks that every point is measured on."""
        return StudyTasks(self.settings)

    def run(self) -> Curve:
        """Measure, or give what is known already; raises as :func:`curve`."""
        self.check()
        with self.alone():
            return self._run()

    def _run(self) -> Curve:
        if self.entry is not None:
            known = Curve.from_json(self.entry.value)
            self.write_curve(known)
            return known
        if not self.goes_on and self.out is not None:
            for name in (SCAN_FILE, PARTIAL_FILE):
                (self.out / name).unlink(missing_ok=True)
        if self.written is not None and self.goes_on:
            there = f"{len(self.written['points'])} of {len(self.units())} points are there"
            say_goes_on(there, self.progress)
        settings = self.settings
        points, states = len(settings.n) * len(settings.strategies), len(settings.states)
        with whole("curve", 2 + points * (1 + states) + self.model.waits_on_disk, self.progress):
            with stage("load the model"):
                measured = self._points()
            found = measured.curve()
        self.say_read()
        if measured.is_complete:
            self.store.put(self.KIND, self.inputs, found.to_json())
        return found

    def _points(self) -> "CurvePoints":
        """The points, on the model that is loaded for them."""
        from .curve_points import CurvePoints

        _ = self.splits, self.tasks.identity  # what is wrong there is said before the loading
        loaded, tokenizer = self.load(self.model)
        return CurvePoints(
            self,
            loaded,
            tokenizer,
            tasks=self.tasks,
            recipe=self._recipe(loaded, tokenizer),
            write=self.write_curve,
        )

    def write_curve(self, curve: Curve) -> None:
        """Write the curve as far as it is known, and its table."""
        self.write(curve.to_json())
        write_curve(curve, self.folder / CURVE_TABLE)

    def _recipe(self, model: Any, tokenizer: Any) -> "Recipe | None":
        """The settings of a healing, which is refused before any work where it cannot be."""
        if "healed" not in self.settings.states:
            return None
        from ..healing.checks import require_healable
        from .healing_stage import choose_recipe

        settings = self.settings
        recipe = settings.heal or choose_recipe(model, settings.heal_steps, settings.seed)
        require_healable(model, tokenizer, self.training_texts(), recipe=recipe)
        return recipe
