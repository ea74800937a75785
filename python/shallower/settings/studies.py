"""Settings of ``run``, ``curve`` and ``compare``: their options and defaults, checked when made.

An option of a study is declared here, and nowhere else: the command line has the fields.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from ..errors import CriterionError, LayersError, PatchError, RecipeError, TextsError
from ..values.estimates import parse_size
from ..values.layers import layer_number, parse_sizes
from . import options as option
from .options import TEXT_ONLY, THREADS, Settings, distinct_names, parse_names, refuse_twice
from .recipe import SHARE, Recipe, check_share
from .stages import TaskSettings
from .target import Target, parse_count, parse_share

Prompts = Path | Sequence[Any] | None
"""A file of prompts, or texts, objects and prompts themselves; None for some of our own."""

State = Literal["cut", "patched", "healed"]
"""How far a cut is made good."""

STATES: tuple[State, ...] = get_args(State)

RacedBy = Literal["loss", "speech"]
"""The judges by which a run races proposals."""

CRITERIA = (
    "angular", "cosine", "relative_l2", "cka", "linear_map", "reachable", "block_influence",
    "magnitude", "xmerge", "one_shot", "mask_regression", "taylor", "weights", "greedy",
    "exhaustive", "evolution", "deepest", "random", "best_plan", "recommended",
)  # fmt: skip
EXPERT_CRITERIA = (
    "frequency", "soft-frequency", "ean", "man", "msan", "reap", "easy-ep", "reconstruction",
    "aimer", "random", "exhaustive", "layers",
)  # fmt: skip
"""The criteria of this package, by which a name is refused without torch."""

_WITHOUT_EFFECT = {"threads", "max_texts", "max_eval_texts", "device_memory", "prompts", "answers"}
"""Settings that change no result, but by what is read, which is known by content."""


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """What every study can be set to, and the command that they are the options of."""

    COMMAND: ClassVar[str]

    max_texts: int = option.measures(1024, "Read the first N calibration texts only.", "N", least=1)
    max_eval_texts: int = option.measures(
        256, "Read the first N held-out texts only.", "N", least=1
    )
    num_choosing: int = 96
    """Texts of the selection set at most; the others are for the calibration."""
    seed: int = option.measures(0, "Seed of whatever is drawn.", "N", least=0)
    top: int = option.measures(4, "Proposals of every criterion.", "K", least=1)
    heal_steps: int | None = option.repair(
        None, "Steps of a healing, 16 sequences each; 5,000 by default.", "N", least=1
    )
    threads: int | None = option.memory(None, THREADS, "N", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_texts", "max_eval_texts"):
            self._check_least(name, 1, TextsError)
        self._check_least("seed", 0)
        self._check_least("top", 1)
        if self.heal_steps is not None:
            self._check_least("heal_steps", 1, RecipeError)

    @property
    def after(self) -> str:
        """When proposals are judged, as :data:`~.verification.AFTER` has it."""
        return "patch"

    def to_json(self) -> dict[str, Any]:
        """Give all settings that results depend on, without places, as plain JSON values."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: _plain(value)
            for name, value in found.items()
            if name not in _WITHOUT_EFFECT and not isinstance(value, Path)
        }

    def _take_places(self, *names: str) -> None:
        """Make paths of the files and folders that settings name."""
        for name in names:
            place = getattr(self, name)
            object.__setattr__(self, name, None if place is None else Path(place))


@dataclass(frozen=True, kw_only=True)
class RunSettings(StudySettings):
    """Settings of :func:`shallower.run`.

    The target is one of ``n``, ``fraction``, ``params``, ``max_loss``, ``target_latency`` and
    ``target_memory``; by none of them it is the knee of the curve of what is lost.

    ``prompts`` and ``answers`` may also be prompts themselves, as for
    :func:`shallower.evaluate_speech`, and answers may be among them; ``heal`` may be the settings
    of the training, which True makes in the dtype of the model, float16 in bfloat16.

    Raises:
        LayersError, CriterionError, RecipeError, TextsError: a setting that is out of range or
            contradicts another.
    """

    COMMAND = "run"

    n: int | None = option.basic(None, "Layers that are to go.", "N")
    fraction: float | None = option.target(
        None, "Share of the layers that is to go, at least, as 0.25.", "F"
    )
    params: int | None = option.target(
        None, "Parameters that are to be left, at most, as 100M or 6.7B.", "P", read=parse_count
    )
    max_loss: float | None = option.target(
        None,
        "Nats a token that may be lost, after the patch. Without any of these and of the targets: "
        "the knee of the curve of what is lost.",
        "X",
    )
    target_latency: float | None = option.target(
        None,
        "Share of the time of a token that is to be left, at most, as 0.8x: by the forecast for "
        "--forecast-device.",
        "S",
        read=parse_share,
    )
    target_memory: int | str | None = option.target(
        None,
        "Bytes of weights and of the cache of --context tokens that are to be left, at most, as "
        "12GB.",
        "SIZE",
    )
    device: str | None = option.target(
        None,
        "Device of that forecast, as gain has them; this machine's GPU if it is one of them, else "
        "a100-80.",
        "NAME",
        name="forecast_device",
    )
    context: int = option.target(2048, "Tokens of a text, of both targets.", "N", least=1)
    blocks: int | None = option.target(None, "Blocks at most; any number by default.", "B", least=1)
    plan_only: bool = option.output(False, "Choose and measure; patch and save no model.")
    text_only: bool = option.output(False, TEXT_ONLY)
    patch: bool = option.repair(
        True,
        "Patch the cut, and choose by what is lost after a patch. Without it the bare cut is "
        "chosen and saved: of a GGUF file as OUT/checkpoint/checkpoint.gguf, in its own types.",
    )
    prompts: Prompts = option.measures(
        None,
        "Prompts to answer, a .jsonl file with prompt or messages; by default 24 built-in ones. By "
        "--judge speech one half of them, or of 120, is for the selection.",
        "PROMPTS",
        name="speech",
        alone=None,
        off=("Measure no speech.", ()),
    )
    judge: RacedBy = option.basic(
        "loss",
        "Judge that the proposals are raced by. loss: of the next token; speech: divergence from "
        "the whole model on its own words.",
    )
    heal: bool | Recipe = option.basic(False, "Train adapters on the patched cut, and merge them.")
    answers: bool | Prompts = option.repair(
        None,
        "Also learn from what the uncut model says to prompts: a .jsonl file with prompt or "
        "messages, and with answer where it has answered already; without one, prompts of our own.",
        "[PROMPTS]",
        alone=True,
        off=(
            "Learn from the texts alone: by default also from answers, if the model chats.",
            False,
        ),
    )
    share: float = option.repair(0.5, SHARE, "X")

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
        if not self.patch and (self.heal or self.answers):
            raise RecipeError(
                "patch = False beside heal or answers (--no-patch, --heal, --answers): only a "
                "patch learns from answers, and only a patched cut is healed; leave out one"
            )

    @property
    def after(self) -> str:
        """When proposals are judged: ``none``, as they are cut; ``patch``, after a quick patch."""
        return "patch" if self.patch else "none"

    def _check_judge(self) -> None:
        if self.judge not in (judges := get_args(RacedBy)):
            raise CriterionError(
                f"unknown judge {self.judge!r}: a run races proposals by {' or '.join(judges)} "
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
class CompareSettings(StudySettings, TaskSettings):
    """Settings of :func:`shallower.compare`.

    Criteria are names of the table ``shallower.criteria``, or criteria of your own; ``best_plan``,
    the blocks most alike together; or ``recommended``, the verified plan of every size, as by
    :func:`shallower.run`. What is healed is patched first where it can be. ``prompts`` are as for
    :func:`shallower.evaluate_speech`.

    Raises:
        LayersError, CriterionError, PatchError, RecipeError, TextsError: a setting that is out of
            range, is named twice or contradicts another.
    """

    COMMAND = "compare"

    max_texts: int = 80
    max_eval_texts: int = 64
    num_choosing: int = 16
    num_patching: int = 64
    """Calibration texts that a quick patch is solved on, at most."""
    n: Sequence[int] = option.basic(
        (1, 2, 4, 8),
        "Layers that go, as 1,2,4,8; 0, the whole model, is always measured.",
        "SIZES",
        read=partial(parse_sizes, least=0),
    )
    criteria: Sequence[Any] | None = option.basic(
        None, "Criteria, comma-separated; all by default (see --list).", "NAMES", read=parse_names
    )
    unit: Literal["layers", "experts"] = option.target(
        "layers",
        "What goes: layers, or experts, --n of each layer that has any, by criteria of experts, "
        "beside the block of layers whose share of the parameters is nearest.",
    )
    judge: Literal["loss", "kl", "options", "speech", "none"] = option.basic(
        "loss",
        "Judge of a cut: loss, of the next token; kl and speech, divergence from the whole model, "
        "on texts or on its own words; options, margin of the right one; none measures no cut.",
    )
    options: str | Path | None = option.measures(
        None,
        "JSON lines with context, options and answer (an index), for --judge options; one half for "
        "the selection, the other for the report.",
        "FILE",
    )
    states: Sequence[State] = option.repair(
        ("cut", "patched"),
        "States: cut, patched, healed; comma-separated.",
        "NAMES",
        read=parse_names,
    )
    patch: Literal["quick", "full"] = option.repair(
        "quick",
        "Patch of a cut. quick: one matrix a block, in seconds; full: all layers behind it.",
    )
    patch_tokens: int = option.repair(
        16_384, "Tokens that a full patch is fitted on.", "N", least=1
    )
    heal: Recipe | None = None
    """Settings of the healing of each cut; by default ours in the dtype of the model."""
    tasks: Sequence[str] = option.measures(
        (), "Tasks beside the loss, comma-separated.", "NAMES", read=parse_names
    )
    prompts: Prompts = option.measures(
        None,
        "JSON lines with prompt or messages, of the judge speech; one half chooses, the other half "
        "reports. Without it prompts of our own.",
        "FILE",
    )
    speech: bool = option.measures(
        False,
        "Also how the cuts speak, on the half of the prompts that reports; beside another "
        "judge on --prompts, or 24 of our own.",
    )
    truth: bool = option.measures(
        False,
        "Also the true losses without single layers, and Kendall's tau of all costs with them.",
    )
    device_memory: int | str | None = option.memory(
        None,
        "Memory to plan with, as 16GB or 80GiB, of a card that need not be here; by default what "
        "the device has free.",
        "SIZE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "n", tuple(n for n in _sizes(self.n) if n))
        if self.unit not in ("layers", "experts"):
            raise CriterionError(f"unit {self.unit!r}: expected layers or experts (unit, --unit)")
        for name in ("states", "tasks"):
            object.__setattr__(self, name, distinct_names(name, getattr(self, name)))
        self._take_places("options", "tasks_dir", "data")
        object.__setattr__(self, "prompts", _prompts(self.prompts))
        if not self.n:
            raise LayersError("expected sizes, as 1,2,4, got none (n, --n)")
        self._check_states()
        self._check_experts()
        if isinstance(self.criteria, str):
            raise CriterionError(f"criteria must be a sequence of names, got {self.criteria!r}")
        if self.criteria is not None:
            object.__setattr__(self, "criteria", tuple(self.criteria))
            refuse_twice("criteria", [str(getattr(one, "name", one)) for one in self.criteria])
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

    def _check_states(self) -> None:
        self._check_least("patch_tokens", 1)
        unknown: list[str] = [name for name in self.states if name not in STATES]
        if unknown or not self.states:
            raise PatchError(
                f"unknown state {', '.join(map(repr, unknown))}: expected some of "
                f"{', '.join(STATES)} (states, --states)"
            )
        states = tuple(name for name in STATES if name in self.states)
        object.__setattr__(self, "states", states)
        if self.patch not in ("quick", "full"):
            raise PatchError(f"patch {self.patch!r}: expected quick or full (patch, --patch)")
        if self.heal is not None and self.heal_steps is not None:
            raise RecipeError("heal_steps beside heal: settings of your own have their own steps")
        if "healed" not in states and (self.heal is not None or self.heal_steps is not None):
            raise RecipeError(
                "heal_steps without the state healed (--heal-steps without --states healed): "
                "name what is to be measured"
            )

    def _check_experts(self) -> None:
        """Experts are compared as bare cuts alone: nothing is patched behind them."""
        if self.unit == "layers":
            return
        if self.states not in (("cut",), ("cut", "patched")) or self.tasks or self.speech:
            raise CriterionError(
                "experts are compared by the losses of bare cuts: leave out states, tasks and "
                "speech, and measure a cut of them by shallower eval --plan PLAN (unit)"
            )
        object.__setattr__(self, "states", ("cut",))


@dataclass(frozen=True, kw_only=True)
class CurveSettings(CompareSettings):
    """Settings of :func:`shallower.curve`: more texts, few criteria and full patches."""

    COMMAND = "curve"

    max_texts: int = 1024
    max_eval_texts: int = 256
    num_choosing: int = 96
    num_patching: int = 24
    criteria: Sequence[Any] | None = option.basic(
        ("recommended", "angular", "deepest"),
        "Criteria, comma-separated (see compare --list).",
        "NAMES",
        read=parse_names,
    )
    patch: Literal["quick", "full"] = "full"


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


def _sizes(sizes: Any) -> tuple[int, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise LayersError(f"expected numbers of layers, as 1,2,4, got {sizes!r} (n, --n)")
    found = sorted({layer_number(n) for n in sizes})
    if found and found[0] < 0:
        raise LayersError(f"n = {found[0]}: expected at least 0 (n, --n)")
    return tuple(found)
