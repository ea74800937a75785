"""Recipes: the presets, and settings that do not fit."""

import json
import math
from dataclasses import replace

import pytest

import shallower as sh
from shallower.settings.recipe import (
    PAPER_PRESETS,
    PRESETS,
    ModelFacts,
    Recipe,
    Resolved,
    find_preset,
)
from tests.healing.cuts import FACTS


# Presets and settings
def test_the_table_is_the_papers():
    rows = {p.name: (p.max_length, p.learning_rate, p.rank) for p in PAPER_PRESETS}
    assert rows == {
        "llama-2-7b": (2048, 3e-4, 2),
        "llama-2-13b": (4096, 3e-4, 64),
        "llama-2-70b": (4096, 3e-5, 8),
        "qwen-7b": (2048, 3e-4, 64),
        "qwen-14b": (4096, 3e-4, 64),
        "mistral-7b": (2048, 3e-6, 4),
        "phi-2": (2048, 2e-4, 64),
    }


@pytest.mark.parametrize("preset", PAPER_PRESETS, ids=lambda preset: preset.name)
def test_auto_finds_the_row_of_a_model_of_the_table(preset):
    facts = ModelFacts(
        preset.model_type, preset.hidden_size, preset.num_layers, 4096, preset.vocab_size
    )
    resolved = Recipe().resolve(facts)
    assert resolved.preset == preset.name
    assert (resolved.rank, resolved.learning_rate) == (preset.rank, preset.learning_rate)
    assert (resolved.steps, resolved.warmup_steps, resolved.dropout) == (5000, 100, 0.05)
    assert (resolved.max_length, resolved.dtype) == (preset.max_length, "nf4")
    assert resolved.packing is False
    assert resolved.batch_size * resolved.accumulation() == 16


@pytest.mark.parametrize("width", [576, 4096])
def test_ours_have_dropout_only_where_it_was_not_found_to_gain_nothing(width):
    facts = ModelFacts("qwen3", width, 36, 40960)
    assert Recipe().resolve(facts).dropout == (0.0 if width < 2048 else 0.05)
    assert Recipe(dropout=0.2).resolve(facts).dropout == 0.2
    assert Recipe(dropout=0.0).resolve(facts).dropout == 0.0


MODELS = {
    "Llama-2-7B": (ModelFacts("llama", 4096, 32, 4096, 32_000), "llama-2-7b"),
    "Llama-2-70B": (ModelFacts("llama", 8192, 80, 4096, 32_000), "llama-2-70b"),
    "Llama-3-8B": (ModelFacts("llama", 4096, 32, 8192, 128_256), "general"),
    "Llama-3.1-70B": (ModelFacts("llama", 8192, 80, 131_072, 128_256), "general"),
    "Yi-6B": (ModelFacts("llama", 4096, 32, 4096, 64_000), "general"),
    "Mistral-7B-v0.1": (ModelFacts("mistral", 4096, 32, 32_768, 32_000), "mistral-7b"),
    "Mistral-7B-v0.3": (ModelFacts("mistral", 4096, 32, 32_768, 32_768), "general"),
    "Ministral-8B": (ModelFacts("mistral", 4096, 36, 32_768, 131_072), "general"),
    "Qwen-7B": (ModelFacts("qwen", 4096, 32, 8192, 151_936), "qwen-7b"),
    "Qwen-14B": (ModelFacts("qwen", 5120, 40, 8192, 152_064), "qwen-14b"),
    "Qwen1.5-7B": (ModelFacts("qwen2", 4096, 32, 32_768, 151_936), "general"),
    "Phi-2": (ModelFacts("phi", 2560, 32, 2048, 51_200), "phi-2"),
    "Phi-1.5": (ModelFacts("phi", 2048, 24, 2048, 51_200), "general"),
    "SmolLM2-135M": (ModelFacts("llama", 576, 30, 8192, 49_152), "small"),
}
"""By the configs on the hub."""


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_rows_are_for_the_models_that_it_healed(name):
    facts, preset = MODELS[name]
    assert find_preset("auto", facts).name == preset


def test_the_presets_decide_on_packing_and_attention():
    """The paper truncates, and adapts the feed-forward alone; the options override a preset."""
    facts = ModelFacts("llama", 4096, 32, 4096, 32_000)
    assert not Recipe().resolve(facts).packing
    assert not Recipe("phi-2").resolve(replace(facts, model_type="phi")).packing
    assert Recipe("general").resolve(facts).packing
    assert Recipe("small").resolve(facts).packing
    assert not Recipe("general", packing=False).resolve(facts).packing
    assert Recipe(packing=True).resolve(facts).packing
    assert not Recipe().resolve(facts).attention
    assert not Recipe("general").resolve(facts).attention
    assert Recipe("small").resolve(facts).attention
    assert not Recipe("small", attention=False).resolve(facts).attention
    assert Recipe(attention=True).resolve(facts).attention
    said = str(Recipe().resolve(facts))
    assert said.endswith("16 sequences of 2048 tokens, truncated; objective lm, weights in nf4")


def test_auto_is_a_dtype_of_the_machine():
    assert Recipe(dtype="auto").resolve(FACTS).dtype == "bfloat16"
    assert Recipe(dtype="auto").resolve(FACTS, auto="float32").dtype == "float32"
    assert Recipe().resolve(FACTS, auto="float32").dtype == "nf4"


def test_names_are_the_papers_however_they_are_written():
    facts = ModelFacts("llama", 4096, 32, 4096)
    for name in ("Llama-2 7B", "llama_2_7b", "LLAMA-2-7B"):
        assert find_preset(name, facts) is PRESETS["llama-2-7b"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(preset="gpt-5"), r"unknown preset 'gpt-5': expected auto, llama-2-7b"),
        (Recipe(preset="phi-2"), r"is for phi, and the model is of the family llama"),
        (Recipe(preset="llama-2-13b"), r"4096 tokens do not fit a model of 2048 positions"),
        (Recipe(max_length=2049), r"2049 tokens do not fit a model of 2048 positions"),
        (Recipe(steps=0), r"steps must be an integer of at least 1, got 0"),
        (Recipe(steps=True), r"steps must be an integer"),
        (Recipe(batch_size=3), r"batch_size \(--batch-size\) of 3 .* choose a divisor of 16"),
        (Recipe(learning_rate=math.nan), r"learning_rate must be in \[0, inf\), got nan"),
        (Recipe(learning_rate=0.0), r"a learning_rate of 0 trains nothing"),
        (Recipe(dropout=1.0), r"dropout must be in \[0, 1.0\), got 1.0"),
        (
            Recipe(objective="reconstruct"),
            r"unknown objective .reconstruct.: expected one of lm, kd",
        ),
        (Recipe(steps=5, warmup_steps=5), r"a warm-up of 5 steps leaves nothing of 5"),
        (Recipe(dtype="nf8"), r"unknown dtype 'nf8': expected one of auto, nf4, int8"),
        (Recipe(share=0), r"share must be above 0 and at most 1, .*, got 0"),
        (Recipe(share=math.nan), r"share must be above 0 and at most 1, .*, got nan"),
        (Recipe(seed=-1), r"seed must be an integer of at least 0"),
        (Recipe(recompute="yes"), r"recompute must be True or False, got 'yes'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe, message):
    with pytest.raises(sh.RecipeError, match=message):
        recipe.resolve(FACTS)


def test_a_share_of_answers_is_told_only_where_there_are_some():
    without, both = (Recipe(share=0.25).resolve(FACTS, answers=there) for there in (False, True))
    assert (without.share, both.share) == (None, 0.25)
    assert without == Recipe().resolve(FACTS)
    assert "share" not in without.to_json()
    assert "answers" not in str(without)
    assert "packed, 25 % of them answers;" in str(both)
    for resolved in (without, both):
        assert Resolved.from_json(json.loads(json.dumps(resolved.to_json()))) == resolved
    assert Recipe(share=1).resolve(FACTS, answers=True).share == 1.0


@pytest.mark.parametrize(("objective", "taught"), [("lm", False), ("kd", True)])
def test_objectives_that_have_a_teacher(objective, taught):
    assert Recipe(objective=objective).resolve(FACTS).has_teacher == taught


def test_what_is_named_goes_before_the_preset():
    named = Recipe(rank=3, learning_rate=2e-3, max_length=99, steps=40, warmup_steps=7, seed=5)
    resolved = named.resolve(FACTS)
    assert (resolved.rank, resolved.learning_rate, resolved.max_length) == (3, 2e-3, 99)
    assert (resolved.steps, resolved.warmup_steps, resolved.eval_every) == (40, 7, 5)
    assert Recipe(steps=40).resolve(FACTS).warmup_steps == 4


def test_auto_fits_the_sequence_to_the_positions():
    assert Recipe().resolve(replace(FACTS, positions=64)).max_length == 64


@pytest.mark.parametrize(("processes", "share"), [(1, 4), (2, 4), (4, 4), (8, 2), (16, 1)])
def test_all_processes_together_take_16_sequences(processes, share):
    resolved = Recipe().resolve(FACTS, processes)
    assert resolved.batch_size == share
    assert resolved.batch_size * resolved.accumulation(processes) * processes == 16


def test_processes_that_cannot_share_are_refused():
    with pytest.raises(sh.RecipeError, match="3 processes cannot share 16 sequences"):
        Recipe().resolve(FACTS, 3)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(learning_rate=1, dropout=0)])
def test_settings_come_back_from_json(recipe):
    resolved = recipe.resolve(FACTS)
    assert Resolved.from_json(json.loads(json.dumps(resolved.to_json()))) == resolved
    for key, value in (("rank", True), ("rank", 2.0), ("packing", 1), ("dtype", 4)):
        with pytest.raises((TypeError, ValueError), match=f"^{key}: .*expected"):
            Resolved.from_json({**resolved.to_json(), key: value})
