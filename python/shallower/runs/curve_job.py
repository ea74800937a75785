"""A curve: checked before anything is loaded, resumed, and known by its job."""

import json
from collections.abc import Iterable, Sequence, Sized
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CriterionError, LayersError, PatchError, RecipeError, TextsError
from ..models.source import ModelSource
from ..processes import refuse_several
from ..progress import track
from ..reporting.curve import write_csv
from ..storage import check_free, write_file
from ..texts.sequences import ReadOnce
from ..texts.sources import Texts
from ..values.curve import OWN_STRATEGIES, STATES, Curve, CurvePoint, State
from ..values.files import CURVE_FILE, CURVE_TABLE, PARTIAL_FILE, SCAN_FILE
from ..values.hashing import hash_of
from ..values.identity import title_of
from ..values.layers import check_sizes, layer_number
from ..values.recipe import Recipe
from ..values.tokens import Tokens
from .contestants import InMemory, ModelStore, inputs_of_one
from .curve_tasks import CurveTasks
from .inputs import texts_inputs
from .run_job import MAX_EVAL_TEXTS, MAX_TEXTS, NUM_CHOOSING, TOP
from .store import Entry, Store

if TYPE_CHECKING:
    from ..texts.splits import Splits
    from .curve_points import CurvePoints
    from .curve_terms import CurveTerms

SIZES = (0, 1, 2, 4, 8)
"""Layers that go, by default."""

STRATEGIES = ("recommended", "similarity", "deepest")
"""Strategies, by default."""

PATCH_TOKENS = 16_384
"""Tokens that a full patch is fitted on, by default: an eighth of those of a single patch, since
a curve has dozens."""


@dataclass(frozen=True, kw_only=True)
class CurveJob:
    """A curve, which is checked when it is made; :func:`curve` says what it does.

    Attributes:
        model: the model, or its source.
        texts: calibration texts, read once.
        eval_texts: texts that report.
        out: the folder to write to.
        sizes: layers that go.
        strategies: names of strategies, and of criteria.
        states: of ``cut``, ``patched`` and ``healed``.
        quick_patch: patch one matrix a block.
        patch_tokens: tokens that a full patch is fitted on, at most.
        tasks: names of tasks to do beside the loss.
        tasks_dir: a folder of further definitions of tasks.
        data: the folder of their data.
        max_items: items of a task at most.
        num_shots: solved examples before each item.
        pass_at: answers to sample to each item of a task that is answered in text.
        heal: settings of a healing.
        heal_steps: steps of a healing.
        top: proposals of every criterion, of the strategy ``recommended``.
        tokens: length of texts, and how many make one forward.
        max_texts: calibration texts that are read, but for a healing.
        max_eval_texts: texts that report, at most.
        num_choosing: texts that choose, at most.
        threads: threads of the Rust core.
        seed: of whatever is drawn.
        command: the words on the command line that asked, without places; empty if none did.
        overwrite: replace what is in ``out``.
        cache: of what was measured before.
        progress: bars with ETA on standard error.

    Raises:
        LayersError, CriterionError, TextsError, PatchError, RecipeError, ProcessesError: as
            :func:`curve`.
    """

    model: ModelSource | InMemory
    texts: Iterable[str]
    eval_texts: Iterable[str]
    out: Path
    sizes: Sequence[int] = SIZES
    strategies: Sequence[str] = STRATEGIES
    states: Sequence[State] = ("cut", "patched")
    quick_patch: bool = False
    patch_tokens: int = PATCH_TOKENS
    tasks: Sequence[str] = ()
    tasks_dir: Path | None = None
    data: Path | None = None
    max_items: int | None = None
    num_shots: int | None = None
    pass_at: int | None = None
    heal: Recipe | None = None
    heal_steps: int | None = None
    top: int = TOP
    tokens: Tokens = field(default_factory=Tokens)
    max_texts: int = MAX_TEXTS
    max_eval_texts: int = MAX_EVAL_TEXTS
    num_choosing: int = NUM_CHOOSING
    threads: int | None = None
    seed: int = 0
    command: str = ""
    overwrite: bool = False
    cache: Store = field(default_factory=lambda: Store(None))
    progress: bool | None = None

    def __post_init__(self) -> None:
        refuse_several("curves are")
        if isinstance(self.sizes, str) or not isinstance(self.sizes, Iterable):
            raise LayersError(f"expected numbers of layers, as 0,1,2,4, got {self.sizes!r} (--n)")
        sizes = sorted({layer_number(n) for n in self.sizes})
        if sizes and sizes[0] < 0:
            raise LayersError(f"n = {sizes[0]}: expected 0 or more layers that go (n, --n)")
        object.__setattr__(self, "sizes", tuple(n for n in sizes if n))
        for name in ("strategies", "states", "tasks"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        self._check_names()
        self._check_numbers()
        for source in (self.texts, self.eval_texts):
            if isinstance(source, str | bytes) or not isinstance(source, Iterable):
                kind = type(source).__name__
                raise TextsError(f"texts must be an iterable of strings, got {kind}")
            if isinstance(source, Texts):
                source.check()

    def _check_names(self) -> None:
        unknown: list[str] = [name for name in self.states if name not in STATES]
        if unknown or not self.states:
            raise PatchError(
                f"unknown state {', '.join(map(repr, unknown))}: expected some of "
                f"{', '.join(STATES)} (states, --states)"
            )
        states = tuple(name for name in STATES if name in self.states)
        object.__setattr__(self, "states", states)
        foreign = [name for name in self.strategies if name not in OWN_STRATEGIES]
        if foreign or not self.strategies:
            from ..judgement.criteria import criteria

            unknown = [name for name in foreign if name not in criteria]
            if unknown or not self.strategies:
                there = dict.fromkeys((*OWN_STRATEGIES, *criteria))
                raise CriterionError(
                    f"unknown strategy {', '.join(map(repr, unknown))}: expected some of "
                    f"{', '.join(there)} (strategies, --strategies)"
                )

    def _check_numbers(self) -> None:
        numbers = {"top": self.top, "patch_tokens": self.patch_tokens}
        numbers |= {"max_texts": self.max_texts, "max_eval_texts": self.max_eval_texts}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                option = name.replace("_", "-")
                raise LayersError(f"{name} = {value!r}: expected at least 1 (--{option})")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise LayersError(f"seed = {self.seed!r}: expected a whole number from 0 on (--seed)")
        if self.heal is not None and self.heal_steps is not None:
            raise RecipeError("heal_steps beside heal: settings of your own have their own steps")
        healed = "healed" in self.states
        if not healed and (self.heal is not None or self.heal_steps is not None):
            raise RecipeError(
                "heal_steps without the state healed (--heal-steps without --states healed): "
                "name what is to be measured"
            )

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded; of a source the config is read.

        Raises:
            OutputError, RecipeError, LayersError, ModelError, MissingExtraError: as :func:`curve`.
        """
        if self._written is None:
            for name in (CURVE_FILE, CURVE_TABLE, SCAN_FILE, PARTIAL_FILE):
                check_free(self.out / name, self.overwrite)
        if "healed" in self.states:
            from ..healing.checks import require_peft

            require_peft()
            if self.heal is not None:
                self.heal.check(original=isinstance(self.model, ModelSource))
        if self.sizes:
            check_sizes(self.sizes, self.model.count_layers())

    @cached_property
    def splits(self) -> "Splits":
        """Texts that fit, choose and report."""
        from ..texts.splits import three_splits

        report = list(islice(self.eval_texts, self.max_eval_texts))
        return three_splits(
            islice(self._read, self.max_texts), report, num_choosing=self.num_choosing,
            seed=self.seed,
        )  # fmt: skip

    @cached_property
    def _read(self) -> ReadOnce:
        return ReadOnce(self.texts)

    @cached_property
    def _of_model(self) -> dict[str, Any] | None:
        """All that the results depend on of the model; None where that is not known."""
        return inputs_of_one(self.model, self.cache)

    @cached_property
    def _identities(self) -> tuple[str, str]:
        """What tells the texts that fit and choose, and those that report, as of a run."""
        tokens, splits = asdict(self.tokens), self.splits
        return hash_of([splits.fit, splits.choose, tokens]), hash_of([splits.report, tokens])

    @cached_property
    def inputs(self) -> dict[str, Any] | None:
        """All that the curve depends on, for the cache; None where that is not known."""
        if self.cache.folder is None or self._of_model is None or not self._is_stock():
            return None
        heal = [self.heal and asdict(self.heal), self.heal_steps, self._trained_on]
        return {
            "model": self._of_model, "name": str(self.model), "texts": list(self._identities),
            "n": list(self.sizes), "strategies": list(self.strategies),
            "states": list(self.states), "quick": self.quick_patch, "tokens": self.patch_tokens,
            "tasks": [self._tasks.to_json(), self._tasks.identity],
            "heal": heal, "top": self.top, "seed": self.seed,
        }  # fmt: skip

    def _is_stock(self) -> bool:
        """Whether all strategies are of this package, whose code is part of what is known."""
        if all(name in OWN_STRATEGIES for name in self.strategies):
            return True
        from ..judgement.criteria import criteria, is_built_in

        named = [name for name in self.strategies if name not in OWN_STRATEGIES]
        return all(is_built_in(criteria[name]) for name in named)

    @cached_property
    def _tasks(self) -> CurveTasks:
        return CurveTasks(
            names=tuple(self.tasks), tasks_dir=self.tasks_dir, data=self.data,
            max_items=self.max_items, num_shots=self.num_shots, pass_at=self.pass_at,
            batch_size=self.tokens.batch_size, seed=self.seed,
        )  # fmt: skip

    @property
    def _trained_on(self) -> Any:
        """What tells the texts of a healing from others, as far as that is known."""
        if "healed" not in self.states or not isinstance(self.texts, Texts | Sized):
            return None  # an iterator can be read once, and need not end
        return texts_inputs(self.texts, self.cache) or str(getattr(self.texts, "source", None))

    @cached_property
    def job(self) -> str | None:
        """A hash of all that the curve depends on; None where that is not known."""
        return None if self.inputs is None else self.cache.key("curve", self.inputs)

    @cached_property
    def entry(self) -> Entry | None:
        """The entry of the cache that holds the curve, if there is one."""
        return self.cache.find("curve", self.inputs)

    @cached_property
    def _written(self) -> Curve | None:
        """The curve in the folder as far as it came, if it is this very one."""
        try:
            values = json.loads((self.out / CURVE_FILE).read_bytes())
            if self.overwrite or self.job is None or values["job"] != self.job:
                return None
            return Curve.from_json(values)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def run(self) -> Curve:
        """Measure, or give what is known already.

        Returns:
            The curve, which is in ``out``.

        Raises:
            ModelError, TextsError, OutputError, CacheError: as :func:`curve`.
        """
        self.check()
        if self.entry is not None:
            curve = Curve.from_json(self.entry.value)
            self._write(curve)
            return curve
        from .curve_points import CurvePoints

        if self._written is None:
            for name in (SCAN_FILE, PARTIAL_FILE):
                (self.out / name).unlink(missing_ok=True)
        _ = self.splits, self._tasks.identity  # what is wrong there is told before the loading
        loaded, tokenizer = self.model.load()
        terms = self._terms(self._recipe(loaded, tokenizer))
        points = CurvePoints(
            loaded, tokenizer, terms, store=ModelStore(self.cache, self._of_model, []),
            earlier=self._written.points if self._written else (),
        )  # fmt: skip
        curve = self._measured(points, terms)
        if points.is_complete:
            self.cache.put("curve", self.inputs, curve.to_json())
        return curve

    def _measured(self, points: "CurvePoints", terms: "CurveTerms") -> Curve:
        """Measure point by point; what is known is written before each next one."""
        found = [points.whole()]
        self._write(self._joined(found, points, terms))
        wanted = [(s, n, name) for s in self.states for n in self.sizes for name in self.strategies]
        with track("curve", len(wanted), self.progress) as advance:
            for state, n, strategy in wanted:
                advance(0, f"{strategy}, n = {n}, {state}")
                found.append(points.point(strategy, n, state))
                self._write(self._joined(found, points, terms))
                advance(1)
        return self._joined(found, points, terms)

    def _joined(
        self, found: Sequence[CurvePoint], points: "CurvePoints", terms: "CurveTerms"
    ) -> Curve:
        """What is known so far, by size, strategy and state."""
        places = {name: place for place, name in enumerate(self.strategies)}
        whole, *cuts = found
        cuts.sort(key=lambda one: (one.n, places[one.strategy], STATES.index(one.state)))
        splits = self.splits
        counts = {"fit": len(splits.fit), "choose": len(splits.choose)}
        return Curve(
            title_of(str(self.model)), points.num_layers, (whole, *cuts),
            {**counts, "report": points.num_texts}, points.dtype, points.tokens.max_length,
            self._tasks.versions, {**terms.settings, "parameters": points.parameters},
        )  # fmt: skip

    def _write(self, curve: Curve) -> None:
        beside = {"job": self.job, "command": self.command}
        content = json.dumps({**curve.to_json(), **beside}, indent=1) + "\n"
        write_file(self.out / CURVE_FILE, content.encode())
        write_csv(curve, self.out / CURVE_TABLE)

    def _recipe(self, model: Any, tokenizer: Any) -> Recipe | None:
        """The settings of a healing, which is refused before any work where it cannot be."""
        if "healed" not in self.states:
            return None
        from ..healing.checks import require_healable
        from .healing_stage import choose_recipe

        recipe = self.heal or choose_recipe(model, self.heal_steps, self.seed)
        require_healable(model, tokenizer, self._to_heal, recipe=recipe)
        return recipe

    @property
    def _to_heal(self) -> ReadOnce:
        """All texts but those that choose or report, as many as the training takes."""
        return ReadOnce(self.splits.training(islice(self._read, self.max_texts, None)))

    def _terms(self, recipe: Recipe | None) -> "CurveTerms":
        from .curve_terms import CurveTerms

        trusted = isinstance(self.model, ModelSource) and self.model.trust_remote_code
        return CurveTerms(
            sizes=self.sizes, strategies=self.strategies, states=self.states, splits=self.splits,
            out=self.out, quick_patch=self.quick_patch, patch_tokens=self.patch_tokens,
            tasks=self._tasks, heal=recipe, to_heal=self._to_heal,
            origin=(str(self.model), trusted), top=self.top, tokens=self.tokens,
            threads=self.threads, seed=self.seed, identities=self._identities, job=self.job,
            progress=self.progress,
        )  # fmt: skip


def _names(what: str, names: Any) -> tuple[str, ...]:
    """Names, each once; refuses one string, which would be a name a letter."""
    option = f"({what}, --{what})"
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise CriterionError(f"{what} must be a sequence of names, got {names!r} {option}")
    found = tuple(names)
    if not all(isinstance(name, str) and name for name in found):
        raise CriterionError(f"{what}: expected names, got {[*found]} {option}")
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise CriterionError(f"named twice: {', '.join(twice)} {option}")
    return found
