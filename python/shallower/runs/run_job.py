"""A run: checked before anything is loaded, resumed, and known by its job."""

import shutil
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LayersError, ModelError, OutputError, RecipeError, TextsError
from ..models.source import ModelSource
from ..reporting.figures import HEAT_MAP_FILE
from ..reporting.results import Run, marks_in, weights_mark
from ..savings.devices import HERE, find_device
from ..storage import check_free
from ..texts.sequences import ReadOnce
from ..texts.sources import Texts
from ..values.files import (
    CHECKPOINT_FOLDER,
    HEALED_FOLDER,
    PARTIAL_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    SCAN_FILE,
)
from ..values.hashing import hash_of
from ..values.recipe import Recipe
from ..values.target import Target
from ..values.tokens import Tokens
from .contestants import InMemory, ModelStore, inputs_of_one
from .continuing import PROMPTS
from .inputs import texts_inputs
from .store import Store

if TYPE_CHECKING:
    from ..texts.splits import Splits
    from .asked import Asked

MAX_TEXTS = 1024
"""Calibration texts by default."""

MAX_EVAL_TEXTS = 256
"""Texts that report, by default."""

NUM_CHOOSING = 96
"""Texts that choose, at most."""

TOP = 4
"""Proposals of every criterion, by default."""

_HELD_OUT = 4
"""Every so many texts one reports, where no held-out texts are given."""


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """A run, whose settings are checked when it is made; :func:`run` says what it does.

    Attributes:
        model: the model, or its source.
        texts: calibration texts, read once.
        eval_texts: texts that report; None to take every fourth of ``texts``.
        target: how shallow the model is to become.
        out: the folder to write to.
        top: proposals of every criterion.
        blocks: blocks at most; None for any number.
        step: layers that go at a time; None for all at once.
        tokens: length of texts, and how many make one forward.
        max_texts: calibration texts that are read, but for a healing.
        max_eval_texts: texts that report, at most.
        num_choosing: texts that choose, at most.
        threads: threads of the Rust core.
        prompts: texts to continue.
        heal: train on the patched cut: True, or the settings.
        heal_steps: steps of the training.
        seed: of whatever is drawn.
        overwrite: replace what is in ``out``.
        cache: of what was measured before.
        command: the words on the command line that asked, without places; empty if none did.
        progress: bars with ETA on standard error.

    Raises:
        LayersError, RecipeError, TextsError: as :func:`run`.
    """

    model: ModelSource | InMemory
    texts: Iterable[str]
    eval_texts: Iterable[str] | None
    target: Target
    out: Path
    top: int = TOP
    blocks: int | None = None
    tokens: Tokens = field(default_factory=Tokens)
    max_texts: int = MAX_TEXTS
    max_eval_texts: int = MAX_EVAL_TEXTS
    num_choosing: int = NUM_CHOOSING
    threads: int | None = None
    prompts: Sequence[str] = PROMPTS
    heal: bool | Recipe = False
    heal_steps: int | None = None
    seed: int = 0
    overwrite: bool = False
    cache: Store = field(default_factory=lambda: Store(None))
    command: str = ""
    progress: bool | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise LayersError(f"seed = {self.seed!r}: expected a whole number from 0 on (--seed)")
        if not isinstance(self.heal, bool | Recipe):
            raise RecipeError(f"heal = {self.heal!r}: expected True, False or a Recipe (--heal)")
        if self.heal_steps is not None and self.heal is not True:
            raise RecipeError(
                "heal_steps without heal=True (--heal-steps without --heal): healing is asked for "
                "by heal, and settings of your own have their own steps"
            )

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded; of a source the config is read.

        Raises:
            OutputError, RecipeError, LayersError, ModelError, MissingExtraError: as :func:`run`.
        """
        if not self._may_go_on:
            for name in self._to_write:
                check_free(self.out / name, self.overwrite)
        if isinstance(self.heal, Recipe):
            # A teacher is loaded by its name, which a model in memory need not have.
            self.heal.check(original=isinstance(self.model, ModelSource))
        if self.heal:
            from ..healing.checks import require_peft

            require_peft()
        if self.target.device not in (None, HERE):
            find_device(str(self.target.device))
        self.target.size(self.model.count_layers())

    @property
    def _to_write(self) -> list[str]:
        """What must not be there yet; a scan may be, beside the work of the scan that made it."""
        names = [RESULTS_FILE, CHECKPOINT_FOLDER, *([HEALED_FOLDER] if self.heal else [])]
        names += [PLAN_FILE, HEAT_MAP_FILE]
        return names if (self.out / PARTIAL_FILE).exists() else [*names, SCAN_FILE]

    def _check_numbers(self) -> None:
        numbers = {"top": self.top, "blocks": self.blocks}
        numbers |= {"max_texts": self.max_texts, "max_eval_texts": self.max_eval_texts}
        for name, value in numbers.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                option = name.replace("_", "-")
                raise LayersError(f"{name} = {value!r}: expected at least 1 (--{option})")
        if isinstance(self.prompts, str) or not all(
            isinstance(prompt, str) and prompt.strip() for prompt in self.prompts
        ):
            raise TextsError("prompts must be a sequence of strings that are not empty (prompts)")
        for source in (self.texts, self.eval_texts):
            if isinstance(source, str | bytes) or not isinstance(source, Iterable | None):
                kind = type(source).__name__
                raise TextsError(f"texts must be an iterable of strings, got {kind}")
            if isinstance(source, Texts):
                source.check()

    @cached_property
    def _read(self) -> ReadOnce:
        return ReadOnce(self.texts)

    @cached_property
    def splits(self) -> "Splits":
        """Texts that fit, choose and report."""
        from ..texts.splits import three_splits

        texts = list(islice(self._read, self.max_texts))
        if self.eval_texts is None:
            report = texts[_HELD_OUT - 1 :: _HELD_OUT]
        else:
            report = list(islice(self.eval_texts, self.max_eval_texts))
        return three_splits(
            texts, report[: self.max_eval_texts], num_choosing=self.num_choosing, seed=self.seed
        )

    @cached_property
    def _of_model(self) -> dict[str, object] | None:
        """All that the results depend on of the model; None where that is not known."""
        return inputs_of_one(self.model, self.cache)

    @cached_property
    def _identities(self) -> tuple[str, str]:
        """What tells the texts that fit and choose, and those that report, from others."""
        tokens = asdict(self.tokens)
        splits = self.splits
        return hash_of([splits.fit, splits.choose, tokens]), hash_of([splits.report, tokens])

    @cached_property
    def job(self) -> str | None:
        """A hash of all that the run depends on; None where that is not known."""
        if self.cache.folder is None or self._of_model is None:
            return None
        heal = [asdict(self.heal) if isinstance(self.heal, Recipe) else self.heal, self._trained_on]
        asked = [self.target.to_json(), self.top, self.blocks, [*self.prompts], self.seed]
        return hash_of([self._of_model, self._identities, asked, heal, self.heal_steps])

    @property
    def _trained_on(self) -> object:
        """What tells the texts of a healing from others, as far as that is known."""
        if not self.heal or not isinstance(self.texts, Texts | Sized):
            return None  # an iterator can be read once, and need not end
        return texts_inputs(self.texts, self.cache) or str(getattr(self.texts, "source", None))

    @cached_property
    def _may_go_on(self) -> bool:
        """Whether what is in the folder is of this very run, which may have been cut short."""
        marks = {} if self.overwrite else marks_in(self.out)
        if marks.get("job") is None or marks["job"] != self.job:
            return False
        folder = self.out / CHECKPOINT_FOLDER  # an ended run may have been changed by somebody
        if not marks.get("ended") or not folder.exists():
            return True
        return marks.get("checkpoint") == weights_mark(folder)

    @cached_property
    def earlier(self) -> Run | None:
        """The results of this very run as far as it came before; None if it did not."""
        if not self._may_go_on:
            return None
        try:
            return Run.load(self.out)
        except (OutputError, ModelError):  # ModelError: the healed model has been taken away
            return None

    def run(self, report: Callable[[Run], None] | None = None) -> Run:
        """Do what is asked for, or give what is there already.

        Args:
            report: hears the results before a healing starts.

        Returns:
            The results.
        """
        self.check()
        from .recommending import Recommending

        if self.overwrite:
            (self.out / PARTIAL_FILE).unlink(missing_ok=True)
        if self._may_go_on:  # what was being saved when it was killed
            for left in self.out.glob(f".{CHECKPOINT_FOLDER}.*"):
                shutil.rmtree(left, ignore_errors=True)
        splits = self.splits
        loaded, tokenizer = self.model.load()
        stage = None
        if self.heal:
            from .healing_stage import HealingStage, choose_recipe

            own = self.heal if isinstance(self.heal, Recipe) else None
            recipe = own or choose_recipe(loaded, self.heal_steps, self.seed)
            stage = HealingStage(
                recipe, self._to_heal, splits.choose, splits.report, self.tokens,
                *self._origin, self.overwrite, self._may_go_on, self.progress,
            )  # fmt: skip
            stage.check(loaded, tokenizer)
        store = ModelStore(self.cache, self._of_model, [])
        done = Recommending(loaded, tokenizer, self._asked, store).run(self.earlier)
        if report is not None:
            report(done)
        if stage is not None and done.healing is None and not self._is_unhealed(done):
            del loaded  # nothing needs it any more, and the training needs its memory
            done = stage.heal(done)
        done = replace(done, marks={**done.marks, "ended": "yes"})
        done.save()
        return done

    @staticmethod
    def _is_unhealed(done: Run) -> bool:
        """Whether the training was tried before, to its end, and made the model no better."""
        best = done.recommended
        return "ended" in done.marks and best is not None and best.unhealed is not None

    @property
    def _asked(self) -> "Asked":
        from .asked import Asked

        return Asked(
            target=self.target, splits=self.splits, out=self.out, top=self.top, blocks=self.blocks,
            tokens=self.tokens, threads=self.threads, prompts=self.prompts,
            seed=self.seed, identities=self._identities, job=self.job, command=self.command,
            progress=self.progress,
        )  # fmt: skip

    @property
    def _origin(self) -> tuple[str, bool]:
        """The name of the model, and whether its own code may be run."""
        trusted = isinstance(self.model, ModelSource) and self.model.trust_remote_code
        return str(self.model), trusted

    @property
    def _to_heal(self) -> ReadOnce:
        """All texts but those that choose or report, as many as the training takes."""
        return ReadOnce(self.splits.training(islice(self._read, self.max_texts, None)))
