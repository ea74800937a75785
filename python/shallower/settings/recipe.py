"""The settings of a healing: the options of ``heal``, the paper's table and our presets."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any, Literal, get_args

from ..errors import RecipeError
from ..values.schema import fields_of, of_type
from . import options as option

GLOBAL_BATCH = 16
"""Sequences in one step of the optimiser, over all devices."""

HealingDtype = Literal["auto", "nf4", "int8", "bfloat16", "float32"]

Objective = Literal["lm", "kd"]

SHARE = "Share of --answers among texts and answers, up to 1."
"""The help of the share, which a patch has too."""

STEPS = 5000
"""Those of the paper."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A row of the paper's table, or one of ours."""

    name: str
    max_length: int  # tokens of a sequence at most
    learning_rate: float  # at its peak
    rank: int  # of the adapters
    model_type: str | None = None  # the family by its config; None fits every family
    hidden_size: int | None = None  # of the model that the paper healed
    num_layers: int | None = None  # before the cut
    vocab_size: int | None = None  # Llama-3-8B has the width and depth of Llama-2-7B
    packing: bool = False  # join documents into full sequences; the paper truncates each to one
    attention: bool = False  # adapt it too; the paper adapts the feed-forward alone
    dropout: float = 0.05  # before the adapters


PAPER_PRESETS = (
    Preset("llama-2-7b", 2048, 3e-4, 2, "llama", 4096, 32, 32_000),
    Preset("llama-2-13b", 4096, 3e-4, 64, "llama", 5120, 40, 32_000),
    Preset("llama-2-70b", 4096, 3e-5, 8, "llama", 8192, 80, 32_000),
    Preset("qwen-7b", 2048, 3e-4, 64, "qwen", 4096, 32, 151_936),
    Preset("qwen-14b", 4096, 3e-4, 64, "qwen", 5120, 40, 152_064),
    Preset("mistral-7b", 2048, 3e-6, 4, "mistral", 4096, 32, 32_000),
    Preset("phi-2", 2048, 2e-4, 64, "phi", 2560, 32, 51_200),
)
"""2403.17887, appendix A; layers are those of the uncut model."""

SMALL = Preset("small", 256, 1e-3, 64, packing=True, attention=True, dropout=0.0)
GENERAL = Preset("general", 2048, 3e-4, 64, packing=True)
"""Ours, for models that the paper did not heal: ``small`` below 2,048 channels."""

SMALL_BELOW = 2048

PRESETS = {preset.name: preset for preset in (*PAPER_PRESETS, SMALL, GENERAL)}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The properties of a model that decide its preset."""

    model_type: str  # as the config names the family
    hidden_size: int
    num_layers: int  # before the cut
    positions: int | None  # the longest sequence that the config admits, if known
    vocab_size: int | None = None


def find_preset(name: str, facts: ModelFacts) -> Preset:
    """Find a preset by its name in any spelling, or by the model for ``auto``.

    ``auto`` is the paper's row if the paper healed this very model, else ours by its width.
    """
    preset = named_preset(name)
    if preset is None:
        return _automatic(facts)
    if preset.model_type not in (None, facts.model_type):
        raise RecipeError(
            f"the preset {preset.name} is for {preset.model_type}, and the model is of the family "
            f"{facts.model_type}: choose auto, or {SMALL.name} or {GENERAL.name}"
        )
    return preset


def named_preset(name: str) -> Preset | None:
    """Find a preset by its name alone; None for ``auto``, RecipeError for an unknown one."""
    if name == "auto":
        return None
    preset = PRESETS.get("-".join(name.lower().replace("_", "-").split()))
    if preset is None:
        raise RecipeError(f"unknown preset {name!r}: expected auto, {', '.join(PRESETS)}")
    return preset


def _automatic(facts: ModelFacts) -> Preset:
    model = facts.model_type, facts.hidden_size, facts.num_layers, facts.vocab_size
    for preset in PAPER_PRESETS:
        healed = preset.model_type, preset.hidden_size, preset.num_layers, preset.vocab_size
        if healed == model:
            return preset
    return SMALL if facts.hidden_size < SMALL_BELOW else GENERAL


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a healing; what is ``None`` is filled in by :meth:`resolve`.

    Adapters are float32; products are bfloat16 unless ``dtype`` is float32. The objective ``lm`` is
    the loss of the next token, as in the paper; ``kd`` the divergence KL(p ‖ q) of the cut's
    next-token distribution q from the uncut model's p, on the same texts.
    """

    preset: str = option.repair(
        "auto", "Preset: auto, by family and size, or a name in the paper's table.", "NAME"
    )
    _: KW_ONLY
    steps: int | None = option.basic(
        None, "Steps of the optimiser, of 16 sequences each; by default 5000.", "N"
    )
    rank: int | None = option.repair(
        None, "Rank of the adapters, and their alpha; by default the preset's.", "N"
    )
    learning_rate: float | None = option.repair(
        None, "Peak learning rate; by default the preset's.", "X"
    )
    max_length: int | None = option.repair(
        None, "Tokens of a sequence at most; by default the preset's.", "N"
    )
    warmup_steps: int | None = option.repair(
        None, "Steps of linear warm-up; by default 100, or a tenth of --steps if that is less.", "N"
    )
    dropout: float | None = option.repair(
        None, "Dropout before the adapters; by default the preset's.", "X"
    )
    batch_size: int | None = option.memory(
        None,
        "Sequences in one forward; gradients are accumulated to 16. By default as many as there is "
        "memory for, 8 at most; on a CPU 4 at most.",
        "N",
    )
    dtype: HealingDtype = option.memory(
        "nf4",
        "Dtype of the frozen weights. auto: bfloat16 on CUDA and CPUs that multiply it, else "
        "float32.",
    )
    packing: bool | None = option.repair(
        None,
        "Fill every sequence up with documents, or truncate each to one. By default the paper's "
        "presets truncate, as the paper does; ours pack.",
    )
    attention: bool | None = option.repair(
        None,
        "Also train adapters on the attention layers. By default small does, general and the "
        "paper's presets do not.",
    )
    objective: Objective = option.repair(
        "lm",
        "What is minimised: the loss of the next token, or the divergence from the uncut model, "
        "which needs --original.",
    )
    share: float = option.repair(0.5, SHARE, "X")
    eval_every: int | None = option.measures(
        None, "Steps between measurements and checkpoints; by default an eighth of --steps.", "N"
    )
    seed: int = option.repair(0, "Seed of the order, the adapters and dropout.", "N")
    recompute: bool | None = option.memory(
        None,
        "Recompute activations in the backward pass, which saves memory; by default where there is "
        "no memory for one sequence without it.",
        name="gradient_checkpointing",
    )

    def resolve(
        self,
        facts: ModelFacts,
        processes: int = 1,
        *,
        auto: HealingDtype = "bfloat16",
        answers: bool = False,
    ) -> "Resolved":
        """Fill in what is not named, and refuse what does not fit.

        A batch size and recomputation that are not named are 4 at most and none; what a device
        has memory for is decided by :mod:`shallower.healing.memory`. Of several processes each
        trains on its own device. ``auto`` is the dtype that ``auto`` stands for on this machine.
        ``answers`` says whether there are answers to train on.

        Raises:
            RecipeError: a preset that is unknown or of another family, a sequence longer than
                the model's positions, or a value out of its range.
        """
        self.check()
        preset = find_preset(self.preset, facts)
        max_length = self.max_length or preset.max_length
        if facts.positions is not None and max_length > facts.positions:
            if self.max_length is not None or self.preset != "auto":
                raise RecipeError(
                    f"sequences of {max_length} tokens do not fit a model of {facts.positions} "
                    f"positions: choose a max_length (--max-length) of {facts.positions} at most"
                )
            max_length = facts.positions
        steps = self.steps or STEPS
        warmup = min(100, steps // 10) if self.warmup_steps is None else self.warmup_steps
        if warmup >= steps and warmup > 0:
            raise RecipeError(
                f"a warm-up of {warmup} steps leaves nothing of {steps}: shorten it "
                "(warmup_steps, --warmup-steps)"
            )
        return Resolved(
            preset=preset.name,
            steps=steps,
            rank=self.rank or preset.rank,
            learning_rate=float(self.learning_rate or preset.learning_rate),
            max_length=max_length,
            warmup_steps=warmup,
            dropout=float(preset.dropout if self.dropout is None else self.dropout),
            batch_size=_batch_size(self.batch_size, processes),
            dtype=auto if self.dtype == "auto" else self.dtype,
            packing=preset.packing if self.packing is None else self.packing,
            attention=preset.attention if self.attention is None else self.attention,
            objective=self.objective,
            eval_every=self.eval_every or max(1, steps // 8),
            seed=self.seed,
            recompute=bool(self.recompute),
            share=float(self.share) if answers else None,
        )

    def check(self, *, original: bool = True, from_patch: bool = False) -> None:
        """Refuse settings that fit no model, before any is loaded, by a RecipeError.

        ``original`` says whether the uncut model is named, which ``kd`` and a patch need.
        """
        if self.objective not in get_args(Objective):
            known = ", ".join(get_args(Objective))
            raise RecipeError(f"unknown objective {self.objective!r}: expected one of {known}")
        if self.objective != "lm" and not original:
            raise RecipeError(
                f"the objective {self.objective} compares with the uncut model: name it "
                f"(original, --original)"
            )
        if from_patch and not original:
            raise RecipeError("a patch needs the uncut model: name it (original, --original)")
        named_preset(self.preset)
        counts = dict.fromkeys(("steps", "rank", "max_length", "batch_size", "eval_every"), 1)
        for name, least in (counts | {"warmup_steps": 0, "seed": 0}).items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise RecipeError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, most in (("learning_rate", math.inf), ("dropout", 1.0)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < most:
                raise RecipeError(f"{name} must be in [0, {most}), got {value!r}")
        for name in ("packing", "attention", "recompute"):
            value = getattr(self, name)
            if value is not None and type(value) is not bool:
                raise RecipeError(f"{name} must be True or False, got {value!r}")
        check_share(self.share)
        if self.learning_rate == 0:
            raise RecipeError("a learning_rate of 0 trains nothing")
        if self.max_length is not None and self.max_length < 2:
            raise RecipeError("max_length must be at least 2: the first token is only given")
        if self.dtype not in get_args(HealingDtype):
            known = ", ".join(get_args(HealingDtype))
            raise RecipeError(f"unknown dtype {self.dtype!r}: expected one of {known}")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A :class:`Recipe` with nothing left open; the attributes are the same."""

    preset: str
    steps: int
    rank: int
    learning_rate: float
    max_length: int
    warmup_steps: int
    dropout: float
    batch_size: int
    dtype: HealingDtype
    packing: bool
    attention: bool
    objective: str
    eval_every: int
    seed: int
    recompute: bool
    share: float | None = None  # None without answers to train on

    def __str__(self) -> str:
        kind = "packed" if self.packing else "truncated"
        if self.share is not None:
            kind += f", {100 * self.share:g} % of them answers"
        return (
            f"preset {self.preset}: rank {self.rank}, peak rate {self.learning_rate:g}, "
            f"{self.steps} steps of {GLOBAL_BATCH} sequences of {self.max_length} tokens, {kind}; "
            f"objective {self.objective}, weights in {self.dtype}"
        )

    @property
    def has_teacher(self) -> bool:
        """Whether the uncut model runs beside the cut in the training."""
        return self.objective == "kd"

    @property
    def is_padded(self) -> bool:
        """Whether sequences of a forward may be of different lengths: answers are kept whole."""
        return not self.packing or self.share is not None

    def accumulation(self, processes: int = 1) -> int:
        """The forwards that each of the processes accumulates in one step of the optimiser."""
        return GLOBAL_BATCH // (self.batch_size * processes)

    def without_dropout(self) -> "Resolved":
        """The same settings without dropout."""
        return replace(self, dropout=0.0)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values; ``share`` only where there are answers."""
        values = {**asdict(self), "global_batch": GLOBAL_BATCH}
        if self.share is None:
            del values["share"]
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Resolved":
        """Read what :meth:`to_json` gave; raises KeyError, TypeError, ValueError."""
        return cls(**fields_of(cls, {"share": None, **of_type(dict, data)}))


def check_share(share: object) -> None:
    """Refuse, by a RecipeError, what is no share of answers among texts and answers."""
    if isinstance(share, bool) or not (isinstance(share, int | float) and 0 < share <= 1):
        raise RecipeError(
            f"share must be above 0 and at most 1, the share of answers among texts and answers, "
            f"got {share!r} (share, --share)"
        )


def _batch_size(given: int | None, processes: int) -> int:
    """The number of sequences in one forward, so that whole forwards make the global batch."""
    if GLOBAL_BATCH % processes:
        raise RecipeError(
            f"{processes} processes cannot share {GLOBAL_BATCH} sequences a step: start 1, 2, 4, 8 "
            f"or 16"
        )
    share = GLOBAL_BATCH // processes
    if given is None:
        return min(4, share)
    if share % given:
        raise RecipeError(
            f"a batch_size (--batch-size) of {given} on {processes} devices does not make "
            f"{GLOBAL_BATCH} sequences a step: choose a divisor of {share}"
        )
    return given
