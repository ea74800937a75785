"""Settings of the studies: frozen values, checked when they are made and handed on whole.

An option of a study is declared here and on its command line, and nowhere else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from ..errors import CriterionError, LayersError, PatchError, RecipeError, SettingsError, TextsError
from .commands import option_words
from .curve import STATES, State
from .layers import layer_number
from .memory import parse_size
from .recipe import Recipe, check_share
from .target import Target
from .tokens import BatchSize, Tokens

Prompts = Path | Sequence[Any] | None
"""A file of prompts, or texts, objects and prompts themselves; None for some of our own."""

RACED_BY = ("loss", "speech")
"""The judges by which a run races proposals."""

_NO_OPTION = {"num_choosing"}
"""Settings that the command line has not."""

_WITHOUT_EFFECT = {"threads", "max_texts", "max_eval_texts", "device_memory", "prompts", "answers"}
"""Settings that change no result, but by what is read, which is known by content."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What every study can be set to.

    Attributes:
        max_length: tokens of a text at most; a healing has its own, by its recipe.
        batch_size: texts in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        max_texts: read the first so many calibration texts only, but for a healing.
        max_eval_texts: read the first so many held-out texts only.
        num_choosing: texts of the selection set at most; the others are for the calibration.
        seed: of whatever is drawn.

    Raises:
        LayersError, TextsError: a number that is out of range.
    """

    PROMPTS_OPTION: ClassVar[str] = "speech"
    """The option that names a file of prompts."""

    max_length: int = 256
    batch_size: BatchSize = "auto"
    max_texts: int = 1024
    max_eval_texts: int = 256
    num_choosing: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.tokens
        for name in ("max_texts", "max_eval_texts"):
            self._check_least(name, 1, TextsError)
        self._check_least("seed", 0)

    @classmethod
    def of(cls, settings: Self | None, options: Mapping[str, Any]) -> Self:
        """Make settings from a value and from keywords that change it.

        Raises:
            SettingsError: there is no setting of that name, or ``settings`` is of another study.
        """
        if settings is not None and not isinstance(settings, cls):
            raise SettingsError(
                f"settings of type {type(settings).__name__}: expected {cls.__name__}"
            )
        names = [one.name for one in fields(cls)]
        for name in options:
            if name not in names:
                near = get_close_matches(name, names, 1)
                meant = f"did you mean {near[0]}?" if near else f"expected of {', '.join(names)}"
                raise SettingsError(f"{cls.__name__} has no setting {name!r}: {meant}")
        return cls(**options) if settings is None else replace(settings, **options)

    @property
    def tokens(self) -> Tokens:
        """The length of texts and how many make one forward."""
        return Tokens(self.max_length, self.batch_size)

    def to_json(self) -> dict[str, Any]:
        """Give all settings that results depend on, without places, as plain JSON values."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: _plain(value)
            for name, value in found.items()
            if name not in _WITHOUT_EFFECT and not isinstance(value, Path)
        }

    def to_words(self) -> list[str]:
        """Give the settings that are not the defaults as options of the command line.

        What only Python can set is left out.
        """
        default = type(self)()
        changed: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if value == getattr(default, one.name) or one.name in _NO_OPTION:
                continue
            if one.name == "prompts":
                file = value.name if isinstance(value, Path) else None
                changed[self.PROMPTS_OPTION] = file or value is None
                changed["no_speech"] = value == ()
                continue
            if one.name == "answers" and isinstance(value, tuple):
                continue
            if one.name == "answers" and value is False:
                changed["no_answers"] = True
                continue
            if isinstance(value, Path):
                value = value.name
            elif not isinstance(value, str | int | float):
                value = (
                    ",".join(map(str, plain)) if isinstance(plain := _plain(value), list) else None
                )
            changed[one.name] = value
        return option_words(changed)

    def _take_places(self, *names: str) -> None:
        """Make paths of the files and folders that settings name."""
        for name in names:
            place = getattr(self, name)
            object.__setattr__(self, name, None if place is None else Path(place))

    def _check_least(self, name: str, least: int, error: type[Exception] = LayersError) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            option = name.replace("_", "-")
            raise error(
                f"{name} = {value!r}: expected a whole number, at least {least} (--{option})"
            )


@dataclass(frozen=True, kw_only=True)
class RacingSettings(StudySettings):
    """Settings of studies that race proposals.

    Attributes:
        top: proposals of every criterion.
        heal_steps: steps of a healing, of 16 sequences each; 5,000 by default.
        threads: threads of the Rust core, all by default.
    """

    top: int = 4
    heal_steps: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least("top", 1)
        if self.heal_steps is not None:
            self._check_least("heal_steps", 1, RecipeError)


@dataclass(frozen=True, kw_only=True)
class RunSettings(RacingSettings):
    """Settings of :func:`shallower.run`.

    The target is one of ``n``, ``fraction``, ``params``, ``max_loss``, ``target_latency`` and
    ``target_memory``; by none of them it is the knee of the curve of what is lost.

    Attributes:
        n: layers that are to go.
        fraction: the share of the layers that is to go, at least.
        params: parameters that are to be left, at most.
        max_loss: nats a token above the whole model that are allowed, after the patch.
        target_latency: the share of the time of a token that is to be left, at most, by the
            forecast of :func:`shallower.gain`.
        target_memory: bytes of the weights and of the cache of one text that are to be left, at
            most, as a number or as ``12GB``.
        device: the device of that forecast, as for :func:`shallower.gain`; by default the GPU of
            this machine if it is in the table, else ``a100-80``.
        context: tokens of a text before it is continued, of both targets.
        blocks: blocks at most; any number by default.
        plan_only: choose and measure, and patch and save nothing.
        prompts: what the models speak on, as for :func:`shallower.evaluate_speech`; by default 24
            of our own, and an empty sequence for none.
        judge: what the proposals are raced by: ``loss``, the next-token loss; ``speech``, the
            divergence from the whole model on its own words. For that one half of ``prompts``
            chooses, by default of 120 of our own, and the models speak on prompts of the other.
        heal: train on the patched cut: True, or the settings. True trains in the dtype of the
            model, float16 in bfloat16.
        answers: patch and train on what the whole model says as well: True for prompts of our own,
            or prompts as of ``prompts``, which may have their answers; False for texts alone. By
            default with ``heal``, to prompts of our own, if the model chats.
        share: the share of answers among texts and answers, of the patch and of the training.

    Raises:
        LayersError, CriterionError, RecipeError, TextsError: a setting that is out of range or
            contradicts another.
    """

    n: int | None = None
    fraction: float | None = None
    params: int | None = None
    max_loss: float | None = None
    target_latency: float | None = None
    target_memory: int | str | None = None
    device: str | None = None
    context: int = 2048
    blocks: int | None = None
    plan_only: bool = False
    prompts: Prompts = None
    judge: str = "loss"
    heal: bool | Recipe = False
    answers: bool | Prompts = None
    share: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.answers, bool | None):
            object.__setattr__(self, "answers", _prompts(self.answers, "answers") or False)
        check_share(self.share)
        if isinstance(self.target_memory, str):
            object.__setattr__(self, "target_memory", parse_size(self.target_memory))
        super().__post_init__()
        _ = self.target
        self._check_judge()
        if self.blocks is not None:
            self._check_least("blocks", 1)
        object.__setattr__(self, "prompts", _prompts(self.prompts))
        if not isinstance(self.heal, bool | Recipe):
            raise RecipeError(f"heal = {self.heal!r}: expected True, False or a Recipe (--heal)")
        own = getattr(self.heal, "share", self.share)
        if self.answers is not False and own not in (self.share, Recipe().share):
            raise RecipeError(
                f"heal has a share of {own:g}, and share is {self.share:g}: name the one of both, "
                f"the patch and the training (share, --share)"
            )
        if self.heal_steps is not None and self.heal is not True:
            raise RecipeError(
                "heal_steps without heal=True (--heal-steps without --heal): a Recipe has its own "
                "steps"
            )
        if self.plan_only and self.heal:
            raise RecipeError("plan_only beside heal (--plan-only, --heal): only a cut is healed")

    def _check_judge(self) -> None:
        if self.judge not in RACED_BY:
            raise CriterionError(
                f"unknown judge {self.judge!r}: a run races proposals by {' or '.join(RACED_BY)} "
                f"(judge, --judge)"
            )
        if self.judge == "speech" and self.max_loss is not None:
            raise LayersError(
                "max_loss beside the judge speech (--max-loss, --judge speech), which measures no "
                "loss: name another target, or race by the loss (--judge loss)"
            )

    @property
    def target(self) -> Target:
        """How many layers are to go."""
        memory = self.target_memory
        return Target(
            self.n,
            self.fraction,
            self.params,
            self.max_loss,
            latency=self.target_latency,
            memory=parse_size(memory) if isinstance(memory, str) else memory,
            device=self.device,
            context=self.context,
        )


@dataclass(frozen=True, kw_only=True)
class CurveSettings(RacingSettings):
    """Settings of :func:`shallower.curve`.

    Attributes:
        n: numbers of layers that go; the whole model is measured in any case.
        strategies: ``recommended``, the verified plan of every size, as by
            :func:`shallower.run`; ``similarity``, the most similar block; ``best_plan``, the most
            similar blocks together; ``deepest``, the deepest layers but the last; or any
            criterion by its name.
        states: of ``cut``, ``patched`` and ``healed``. What is healed is patched first where it
            can be.
        quick_patch: patch by one matrix a block, in seconds, as criteria are compared; by
            default in full, as by :func:`shallower.patch`.
        patch_tokens: tokens that a full patch is fitted on, at most: by default an eighth of
            those of a single patch, since a curve has dozens.
        tasks: names of tasks to do beside the loss; the main measure of each is kept.
        tasks_dir: a folder of further definitions of tasks.
        data: the folder in which task files find their data; by default that of the variable
            ``SHALLOWER_DATA``.
        max_items: items of a task at most; all by default.
        num_shots: solved examples before each item; as the task says by default.
        pass_at: for tasks that are answered in text also sample so many answers to each item, and
            keep ``pass@K`` of them as a task of its own, ``TASK sampled``.
        heal: settings of the healing of each cut; by default ours in the dtype of the model.
        prompts: what the models speak on, as for :func:`shallower.evaluate_speech`; by default
            they are not let to, and None is 24 prompts of our own.

    Raises:
        LayersError, CriterionError, PatchError, RecipeError, TextsError: a setting that is out of
            range, is named twice or contradicts another.
    """

    n: Sequence[int] = (0, 1, 2, 4, 8)
    strategies: Sequence[str] = ("recommended", "similarity", "deepest")
    states: Sequence[State] = ("cut", "patched")
    quick_patch: bool = False
    patch_tokens: int = 16_384
    tasks: Sequence[str] = ()
    tasks_dir: str | Path | None = None
    data: str | Path | None = None
    max_items: int | None = None
    num_shots: int | None = None
    pass_at: int | None = None
    heal: Recipe | None = None
    prompts: Prompts = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "n", tuple(n for n in _sizes(self.n, least=0) if n))
        object.__setattr__(self, "prompts", _prompts(self.prompts))
        for name in ("strategies", "states", "tasks"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        self._take_places("tasks_dir", "data")
        self._check_least("patch_tokens", 1)
        unknown: list[str] = [name for name in self.states if name not in STATES]
        if unknown or not self.states:
            raise PatchError(
                f"unknown state {', '.join(map(repr, unknown))}: expected some of "
                f"{', '.join(STATES)} (states, --states)"
            )
        states = tuple(name for name in STATES if name in self.states)
        object.__setattr__(self, "states", states)
        if self.heal is not None and self.heal_steps is not None:
            raise RecipeError("heal_steps beside heal: settings of your own have their own steps")
        if "healed" not in states and (self.heal is not None or self.heal_steps is not None):
            raise RecipeError(
                "heal_steps without the state healed (--heal-steps without --states healed): "
                "name what is to be measured"
            )

    @property
    def patch(self) -> str | None:
        """The patch that is measured: ``quick`` or ``full``; None where none is."""
        if set(self.states) == {"cut"}:
            return None
        return "quick" if self.quick_patch else "full"


@dataclass(frozen=True, kw_only=True)
class CompareSettings(StudySettings):
    """Settings of :func:`shallower.compare`.

    Attributes:
        n: how many layers are to go.
        criteria: names of the table ``shallower.criteria``, or criteria of your own; all by
            default.
        unit: what goes: ``layers``, or ``experts``, ``n`` of every layer that has any, by criteria
            of experts.
        judge: selects: ``loss``, the next-token loss; ``kl``, the divergence from the whole
            model's next-token distributions; ``options``, the margin of right options;
            ``speech``, the divergence from the whole model on its own words.
        options: a file of JSON lines with ``context``, ``options`` and ``answer``, of the judge
            ``options``; one half chooses, the other one reports.
        prompts: of the judge ``speech``, as for :func:`shallower.evaluate_speech`; one half
            chooses, the other one reports. By default prompts of our own.
        speech: also measure how the bare cuts speak, on the test prompts, or on ``prompts``
            beside another judge: by default 24 of our own.
        device_memory: bytes for the states that cuts share, as a number or as ``4GB``; by default
            what the device has free.

    Raises:
        LayersError, CriterionError, TextsError: a setting that is out of range, is named twice or
            contradicts another.
    """

    PROMPTS_OPTION: ClassVar[str] = "prompts"

    max_texts: int = 80
    max_eval_texts: int = 64
    num_choosing: int = 16
    n: Sequence[int] = (1, 2, 4, 8)
    criteria: Sequence[Any] | None = None
    unit: Literal["layers", "experts"] = "layers"
    judge: str = "loss"
    options: str | Path | None = None
    prompts: Prompts = None
    speech: bool = False
    device_memory: int | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "n", _sizes(self.n, least=1))
        if self.unit not in ("layers", "experts"):
            raise CriterionError(f"unit {self.unit!r}: expected layers or experts (unit, --unit)")
        if self.unit == "experts" and self.speech:
            raise CriterionError(
                "compare does not measure speech without experts: use shallower "
                "eval --plan PLAN --speech (speech)"
            )
        self._take_places("options")
        object.__setattr__(self, "prompts", _prompts(self.prompts))
        if not self.n:
            raise LayersError("expected sizes, as 1,2,4, got none (n, --n)")
        if isinstance(self.criteria, str):
            raise CriterionError(f"criteria must be a sequence of names, got {self.criteria!r}")
        if self.criteria is not None:
            object.__setattr__(self, "criteria", tuple(self.criteria))
            _refuse_twice("criteria", [str(getattr(one, "name", one)) for one in self.criteria])
        if (self.options is not None) != (self.judge == "options"):
            raise CriterionError(
                "the judge options needs a file of items, and no other judge takes one "
                "(judge and options, --judge options and --options)"
            )
        if self.prompts is not None and self.judge != "speech" and not self.speech:
            raise CriterionError(
                f"prompts beside the judge {self.judge}: only the judge speech takes them, and "
                f"speech (--judge speech, --speech, or no --prompts)"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Recipe):
        return asdict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [one if isinstance(one, str | int) else one.name for one in value]
    return value


def _prompts(given: Any, option: str = "speech") -> Prompts:
    """A file of prompts, the prompts themselves, or None."""
    if given is None or isinstance(given, Path):
        return given
    if isinstance(given, str):
        return Path(given)
    if not isinstance(given, Iterable):
        raise TextsError(
            f"prompts must be a file or a sequence, got {type(given).__name__} (--{option})"
        )
    return tuple(given)


def _sizes(sizes: Any, *, least: int) -> tuple[int, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise LayersError(f"expected numbers of layers, as 1,2,4, got {sizes!r} (n, --n)")
    found = sorted({layer_number(n) for n in sizes})
    if found and found[0] < least:
        raise LayersError(f"n = {found[0]}: expected at least {least} (n, --n)")
    return tuple(found)


def _names(what: str, names: Any) -> tuple[str, ...]:
    """Names, each once; refuses one string, which would be a name a letter."""
    option = f"({what}, --{what.replace('_', '-')})"
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise CriterionError(f"{what} must be a sequence of names, got {names!r} {option}")
    found = tuple(names)
    if not all(isinstance(name, str) and name for name in found):
        raise CriterionError(f"{what}: expected names, got {[*found]} {option}")
    _refuse_twice(what, found)
    return found


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise CriterionError(f"named twice: {', '.join(twice)} ({what}, --{what})")
