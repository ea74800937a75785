"""The paper's table of healings as data, and our presets beside it."""

from dataclasses import dataclass

from ..errors import RecipeError


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
