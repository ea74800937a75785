"""The settings of a healing: the paper's table as data, and our defaults beside it."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any, Literal, get_args

from ..errors import RecipeError

GLOBAL_BATCH = 16
"""Sequences in one step of the optimiser, over all devices."""

HealingDtype = Literal["auto", "nf4", "int8", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class Preset:
    """A row of the paper's table, or one of ours.

    Attributes:
        name: the name that ``--preset`` takes.
        max_length: tokens of a sequence at most.
        learning_rate: peak learning rate.
        rank: rank of the adapters.
        model_type: the family by its config; None fits every family.
        hidden_size: channels of the residual stream of the model that the paper healed.
        num_layers: its decoder layers, before the cut.
        vocab_size: its vocabulary: Llama-3-8B has the width and depth of Llama-2-7B.
        packing: whether documents are joined into full sequences; the paper truncates each to
            one sequence.
    """

    name: str
    max_length: int
    learning_rate: float
    rank: int
    model_type: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    vocab_size: int | None = None
    packing: bool = False


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

SMALL = Preset("small", 256, 1e-3, 64, packing=True)
GENERAL = Preset("general", 2048, 3e-4, 64, packing=True)
"""Ours, for models that the paper did not heal: ``small`` below 2,048 channels."""

SMALL_BELOW = 2048

PRESETS = {preset.name: preset for preset in (*PAPER_PRESETS, SMALL, GENERAL)}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The properties of a model that decide its preset.

    Attributes:
        model_type: the family, as the config names it.
        hidden_size: channels of the residual stream.
        num_layers: decoder layers before the cut.
        positions: the longest sequence that the config admits, if it says so.
        vocab_size: size of the vocabulary, if the config says so.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    positions: int | None
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a healing; what is ``None`` is filled in by :meth:`resolve`.

    Attributes:
        preset: ``auto``, which picks by family and size, or a name in ``PRESETS``.
        steps: steps of the optimiser, of 16 sequences each; the paper takes 5,000.
        rank: rank of the adapters; alpha is the same.
        learning_rate: peak learning rate.
        max_length: tokens of a sequence at most.
        warmup_steps: steps of linear warm-up, by default 100 or a tenth of ``steps`` if that
            is less; a cosine to zero follows.
        dropout: dropout before the adapters.
        batch_size: sequences in one forward of a device; gradients are accumulated to 16. By
            default as many as there is memory for, 8 at most; on a CPU 4 at most.
        dtype: dtype of the frozen weights; ``auto`` is bfloat16 on CUDA and on CPUs that
            multiply it, and float32 elsewhere. Adapters are float32; products are bfloat16 unless
            this is float32.
        packing: join documents and cut them into sequences of ``max_length``, or truncate every
            text to one sequence. By default the preset decides: the paper's truncate, as the
            paper does; ``small`` and ``general`` pack.
        attention: also train adapters on the attention layers.
        distill: weight of the distillation at the cut; 0 is none.
        eval_every: steps between two measurements and checkpoints, by default an eighth of
            ``steps``.
        seed: seed of the order of sequences, the adapters and dropout.
        recompute: gradient checkpointing: recompute activations in the backward pass, which
            saves memory (``--gradient-checkpointing``); by default where there is no memory for
            one sequence without it.
    """

    preset: str = "auto"
    _: KW_ONLY
    steps: int = 5000
    rank: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    warmup_steps: int | None = None
    dropout: float = 0.05
    batch_size: int | None = None
    dtype: HealingDtype = "nf4"
    packing: bool | None = None
    attention: bool = False
    distill: float = 0.0
    eval_every: int | None = None
    seed: int = 0
    recompute: bool | None = None

    def resolve(
        self, facts: ModelFacts, processes: int = 1, *, auto: HealingDtype = "bfloat16"
    ) -> "Resolved":
        """Fill in what is not named, and refuse what does not fit.

        A batch size and recomputation that are not named are 4 at most and none; what a device
        has memory for is decided by :mod:`shallower.healing.memory`.

        Args:
            facts: the properties of the model.
            processes: the number of processes that train together, each on its own device.
            auto: the dtype that ``auto`` stands for on this machine.

        Returns:
            The same settings with nothing left open.

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
            learning_rate=float(self.learning_rate or preset.learning_rate),
            max_length=max_length,
            warmup_steps=warmup,
            dropout=float(self.dropout),
            batch_size=_batch_size(self.batch_size, processes),
            dtype=auto if self.dtype == "auto" else self.dtype,
            packing=preset.packing if self.packing is None else self.packing,
            attention=self.attention,
            distill=float(self.distill),
            eval_every=self.eval_every or max(1, self.steps // 8),
            seed=self.seed,
            recompute=bool(self.recompute),
        )

    def check(self, *, original: bool = True, from_patch: bool = False) -> None:
        """Refuse settings that fit no model, before any is loaded.

        Args:
            original: whether the uncut model is named, which distillation and a patch need.
            from_patch: whether the cut is patched first.

        Raises:
            RecipeError: an unknown preset, a value out of its range, or no uncut model.
        """
        if self.distill and not original:
            raise RecipeError("distillation needs the uncut model: name it (original, --original)")
        if from_patch and not original:
            raise RecipeError("a patch needs the uncut model: name it (original, --original)")
        _named_preset(self.preset)
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
        for name in ("packing", "attention", "recompute"):
            value = getattr(self, name)
            if value is not None and type(value) is not bool:
                raise RecipeError(f"{name} must be True or False, got {value!r}")
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
    distill: float
    eval_every: int
    seed: int
    recompute: bool

    def __str__(self) -> str:
        kind = "packed" if self.packing else "truncated"
        return (
            f"preset {self.preset}: rank {self.rank}, peak rate {self.learning_rate:g}, "
            f"{self.steps} steps of {GLOBAL_BATCH} sequences of {self.max_length} tokens, {kind}; "
            f"weights in {self.dtype}"
        )

    def accumulation(self, processes: int = 1) -> int:
        """The number of forwards that are accumulated in one step of the optimiser.

        Args:
            processes: the number of processes that share a step.

        Returns:
            Forwards of ``batch_size`` sequences, of each process.
        """
        return GLOBAL_BATCH // (self.batch_size * processes)

    def without_dropout(self) -> "Resolved":
        """The same settings without dropout."""
        return replace(self, dropout=0.0)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {**asdict(self), "global_batch": GLOBAL_BATCH}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Resolved":
        """Read settings from the values of a file.

        Args:
            data: what :meth:`to_json` gave.

        Returns:
            The settings.

        Raises:
            TypeError: a value is of another type.
            KeyError: a value is missing.
        """
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
    """Find a preset by its name.

    Args:
        name: ``auto``, for the paper's row if the paper healed this very model, else ours by
            its width; or a name in ``PRESETS``, in any case, with spaces, dashes or
            underscores.
        facts: the properties of the model.

    Returns:
        The preset.

    Raises:
        RecipeError: there is none of this name, or it is for another family.
    """
    preset = _named_preset(name)
    if preset is None:
        return _automatic(facts)
    if preset.model_type not in (None, facts.model_type):
        raise RecipeError(
            f"the preset {preset.name} is for {preset.model_type}, and the model is of the family "
            f"{facts.model_type}: choose auto, or {SMALL.name} or {GENERAL.name}"
        )
    return preset


def _named_preset(name: str) -> Preset | None:
    """The preset of a name; None for ``auto``."""
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


def _batch_size(wanted: int | None, processes: int) -> int:
    """The number of sequences in one forward, so that whole forwards make the global batch."""
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
