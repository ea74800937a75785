"""How to heal: the paper's table as data, our defaults beside it, and the settings of a run."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from ..errors import RecipeError

GLOBAL_BATCH = 16
"""Sequences in one step of the optimiser, over all devices."""

HealingDtype = Literal["nf4", "int8", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class Preset:
    """A row of the paper's table, or one of ours."""

    name: str
    max_length: int
    learning_rate: float
    rank: int
    model_type: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None


PAPER_PRESETS = (
    Preset("llama-2-7b", 2048, 3e-4, 2, "llama", 4096, 32),
    Preset("llama-2-13b", 4096, 3e-4, 64, "llama", 5120, 40),
    Preset("llama-2-70b", 4096, 3e-5, 8, "llama", 8192, 80),
    Preset("qwen-7b", 2048, 3e-4, 64, "qwen", 4096, 32),
    Preset("qwen-14b", 4096, 3e-4, 64, "qwen", 5120, 40),
    Preset("mistral-7b", 2048, 3e-6, 4, "mistral", 4096, 32),
    Preset("phi-2", 2048, 2e-4, 64, "phi", 2560, 32),
)
"""2403.17887, appendix A; layers are those of the uncut model."""

SMALL = Preset("small", 256, 1e-3, 64)
GENERAL = Preset("general", 2048, 3e-4, 64)
"""Ours, for models that the paper did not heal: ``small`` below 2,048 channels."""

SMALL_BELOW = 2048

PRESETS = {preset.name: preset for preset in (*PAPER_PRESETS, SMALL, GENERAL)}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What of a model decides its preset.

    Attributes:
        model_type: as its config names it.
        hidden_size: channels of the residual stream.
        num_layers: decoder layers before the cut.
        positions: the longest sequence that its config admits, if it says so.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    positions: int | None


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a healing; what is ``None`` is filled in by :meth:`resolve`.

    Attributes:
        preset: ``auto``, which picks by family and size, or a name in ``PRESETS``.
        steps: steps of the optimiser, of 16 sequences each; the paper takes 5,000.
        rank: of the adapters; alpha is the same.
        learning_rate: its peak.
        max_length: tokens of a sequence at most.
        warmup_steps: linear warm-up, 100 by default or a tenth of the steps if that is less;
            a cosine to zero follows.
        dropout: before the adapters.
        batch_size: sequences in one forward of a device; gradients are accumulated to 16.
        dtype: of the frozen weights. Adapters are float32; products are bfloat16 unless this
            is float32.
        packing: join documents and cut them into sequences of ``max_length``; else every text
            is one sequence, truncated.
        attention: adapt the attention, too.
        distill: weight of the distillation at the cut; 0 is none.
        eval_every: steps between two measurements and checkpoints, an eighth by default.
        seed: of the order of sequences, the adapters and dropout.
        recompute: recompute activations in the backward pass, which saves memory.
    """

    preset: str = "auto"
    steps: int = 5000
    rank: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    warmup_steps: int | None = None
    dropout: float = 0.05
    batch_size: int | None = None
    dtype: HealingDtype = "nf4"
    packing: bool = True
    attention: bool = False
    distill: float = 0.0
    eval_every: int | None = None
    seed: int = 0
    recompute: bool = False

    def resolve(self, facts: ModelFacts, processes: int = 1) -> "Resolved":
        """Fill in what is not named, and refuse what does not fit.

        Args:
            facts: of the model.
            processes: how many train together, each on its own device.

        Raises:
            RecipeError: a preset of another model or unknown, a sequence longer than the
                model's positions, or a value out of its range.
        """
        self._check()
        preset = find_preset(self.preset, facts)
        max_length = self.max_length or preset.max_length
        if facts.positions is not None and max_length > facts.positions:
            if self.max_length is not None or self.preset != "auto":
                raise RecipeError(
                    f"sequences of {max_length} tokens do not fit a model of {facts.positions} "
                    f"positions: choose a max_length (--max-length) of {facts.positions} at most"
                )
            max_length = facts.positions
        warmup = min(100, self.steps // 10) if self.warmup_steps is None else self.warmup_steps
        if warmup >= self.steps and warmup > 0:
            raise RecipeError(
                f"a warm-up of {warmup} steps leaves nothing of {self.steps}: shorten it "
                "(warmup_steps, --warmup-steps)"
            )
        return Resolved(
            preset=preset.name,
            steps=self.steps,
            rank=self.rank or preset.rank,
            learning_rate=self.learning_rate or preset.learning_rate,
            max_length=max_length,
            warmup_steps=warmup,
            dropout=self.dropout,
            batch_size=_batch_size(self.batch_size, processes),
            dtype=self.dtype,
            packing=self.packing,
            attention=self.attention,
            distill=self.distill,
            eval_every=self.eval_every or max(1, self.steps // 8),
            seed=self.seed,
            recompute=self.recompute,
        )

    def _check(self) -> None:
        for name in ("steps", "rank", "max_length", "batch_size", "eval_every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise RecipeError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("warmup_steps", "seed"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise RecipeError(f"{name} must be an integer of at least 0, got {value!r}")
        for name, most in (("learning_rate", math.inf), ("dropout", 1.0), ("distill", math.inf)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < most:
                raise RecipeError(f"{name} must be in [0, {most}), got {value!r}")
        if self.learning_rate == 0:
            raise RecipeError("a learning_rate of 0 trains nothing")
        if self.max_length is not None and self.max_length < 2:
            raise RecipeError("max_length must be at least 2: the first token is only given")
        if self.dtype not in get_args(HealingDtype):
            known = ", ".join(get_args(HealingDtype))
            raise RecipeError(f"unknown dtype {self.dtype!r}: expected one of {known}")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe with nothing left open; attributes as of :class:`Recipe`."""

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
    distill: float
    eval_every: int
    seed: int
    recompute: bool

    def accumulation(self, processes: int = 1) -> int:
        """Forwards that are accumulated in one step of the optimiser."""
        return GLOBAL_BATCH // (self.batch_size * processes)

    def without_dropout(self) -> "Resolved":
        """The same, with no dropout."""
        return replace(self, dropout=0.0)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {**asdict(self), "global_batch": GLOBAL_BATCH}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Resolved":
        """Settings from a file; raises TypeError or KeyError."""
        kinds: dict[str, type[Any]] = {
            **dict.fromkeys(("learning_rate", "dropout", "distill"), float),
            **dict.fromkeys(("preset", "dtype"), str),
            **dict.fromkeys(("packing", "attention", "recompute"), bool),
        }
        values = {}
        for name in cls.__slots__:
            kind = kinds.get(name, int)
            value = data[name]
            if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
                raise TypeError(f"expected {name} to be {kind.__name__}, got {value!r}")
            values[name] = value
        return cls(**values)


def find_preset(name: str, facts: ModelFacts) -> Preset:
    """The preset of a name; for ``auto`` the paper's for this family and size, or ours.

    Raises:
        RecipeError: there is none of this name, or it is for another family.
    """
    if name == "auto":
        return _automatic(facts)
    preset = PRESETS.get("-".join(name.lower().replace("_", "-").split()))
    if preset is None:
        raise RecipeError(f"unknown preset {name!r}: expected auto, {', '.join(PRESETS)}")
    if preset.model_type not in (None, facts.model_type):
        raise RecipeError(
            f"the preset {preset.name} is for {preset.model_type}, and the model is of the family "
            f"{facts.model_type}: choose auto, or {SMALL.name} or {GENERAL.name}"
        )
    return preset


def _automatic(facts: ModelFacts) -> Preset:
    for preset in PAPER_PRESETS:
        size = preset.hidden_size, preset.num_layers
        if preset.model_type == facts.model_type and size == (facts.hidden_size, facts.num_layers):
            return preset
    return SMALL if facts.hidden_size < SMALL_BELOW else GENERAL


def _batch_size(wanted: int | None, processes: int) -> int:
    """Sequences in one forward, so that whole forwards make the global batch."""
    if GLOBAL_BATCH % processes:
        raise RecipeError(
            f"{processes} processes cannot share {GLOBAL_BATCH} sequences a step: start 1, 2, 4, 8 "
            f"or 16"
        )
    share = GLOBAL_BATCH // processes
    if wanted is None:
        return min(4, share)
    if share % wanted:
        raise RecipeError(
            f"a batch_size (--batch-size) of {wanted} on {processes} devices does not make "
            f"{GLOBAL_BATCH} sequences a step: choose a divisor of {share}"
        )
    return wanted
