"""The memory of a healing, planned without weights, against torch's own tracker."""

import itertools
from dataclasses import replace

import pytest
import torch

import shallower as sh
from shallower.errors import ModelError, RecipeError
from shallower.healing import memory
from shallower.healing.checks import facts
from shallower.healing.memory import HealingStep, is_small, plan_healing, require_room
from shallower.memory.device import Room
from shallower.memory.rehearsal import build_empty
from shallower.memory.weights import weight_bytes
from shallower.models.loading import layers_of
from shallower.settings.recipe import Recipe
from shallower.values.estimates import needed_device, usable
from tests.conftest import mostly_slow
from tests.families import small_config
from tests.memory_oracle import shape, tracked_healing

NAMED = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "qwen2.5-7b", "phi-2")
OTHERS = ("mistral-7b", "gemma-2-2b", "gpt2-xl", "falcon-7b")


def step_of(name, layers=None, *, length=2048, rank=2, dtype="bfloat16", **options):
    config, _ = shape(name, layers)
    return HealingStep(config, resolved(config, length, rank, dtype, **options))


def resolved(config, length, rank=2, dtype="nf4", **options):
    options = {"packing": True, "attention": False, "dropout": 0.05, **options}
    recipe = Recipe(rank=rank, max_length=length, dtype=dtype, **options)
    return recipe.resolve(facts(config, layers_of(config)))


def assert_near_the_tracker(
    name, layers, batch, length=2048, recompute=False, rank=2, attention=False
):
    step = step_of(name, layers, length=length, rank=rank, attention=attention)
    parts = step.parts(batch, recompute)
    found = tracked_healing(name, layers, batch, length, rank, recompute, attention=attention)
    assert sum(parts.values()) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(
    ("name", "recompute"),
    mostly_slow(itertools.product(NAMED, (False, True)), quick=[("phi-2", True)]),
)
def test_a_few_layers_are_within_15_percent_of_the_tracker(name, recompute):
    assert_near_the_tracker(name, 2, 1 if recompute else 4, recompute=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_families_that_nobody_tuned_for_are_too(name):
    length = 1024 if name == "gpt2-xl" else 2048
    assert_near_the_tracker(name, 2, 2, length)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", NAMED)
def test_whole_models_are_within_15_percent_of_the_tracker(name, batch, recompute):
    parts = step_of(name).parts(batch, recompute)
    assert sum(parts.values()) == pytest.approx(
        tracked_whole(name, 2048, 2, batch, recompute), rel=0.15
    )


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_what_the_tracker_finds_grows_by_as_much_for_every_layer(recompute):
    found = tracked_healing("llama-2-7b", None, 1, 2048, 2, recompute)
    assert tracked_whole("llama-2-7b", 2048, 2, 1, recompute) == pytest.approx(found, rel=0.02)


def tracked_whole(name, length, rank, batch=1, recompute=True):
    """The tracker's peak for a whole model, which takes it hours, from those of a few layers."""
    two, four = (tracked_healing(name, n, batch, length, rank, recompute) for n in (2, 4))
    return two + (layers_of(shape(name)[0]) - 2) * (four - two) // 2


# What is chosen
LLAMA, _ = shape("llama-2-7b", 3)
ONE_LAYER, _ = shape("llama-2-7b", 1)


@pytest.fixture(scope="module")
def small():
    return HealingStep(LLAMA, resolved(LLAMA, 512))


@pytest.fixture
def step(small, monkeypatch):
    """A step that is built once for all choices."""
    monkeypatch.setattr(memory, "_LAST", {})
    monkeypatch.setattr(memory, "HealingStep", lambda *_args, **_options: small)
    return small


def chosen(step, texts, recomputed, spare=1.0, card=True, **options):
    """The choice for a device that has room for a choice, or for a part of it."""
    device = needed_device(int(spare * sum(step.parts(texts, recomputed).values())))
    plan = plan_healing(LLAMA, step.recipe, room=Room(device, card), **options)
    return plan.micro_batch, plan.gradient_checkpointing, plan.fits


@pytest.mark.slow
def test_what_is_fastest_of_that_which_fits_is_chosen(step):
    assert chosen(step, 4, False) == (4, False, True)
    assert chosen(step, 4, False, 2.0) == (4, False, True)
    assert chosen(step, 4, False, 0.99) == (2, False, True)
    assert chosen(step, 1, False) == (1, False, True)
    assert chosen(step, 1, False, 0.99)[1:] == (True, True)
    assert chosen(step, 1, True) == (1, True, True)


def test_what_needs_least_is_chosen_where_nothing_fits(step):
    assert chosen(step, 1, True, 0.99) == (1, True, False)
    plan = plan_healing(LLAMA, step.recipe, room=Room(1_600_000_000, card=True))
    with pytest.raises(RecipeError, match=r"shorten sequences to 256 tokens .*--max-length"):
        require_room(plan, step.recipe)
    plan = plan_healing(LLAMA, step.recipe, room=Room(1_200_000_000, card=True))
    with pytest.raises(RecipeError, match=r"there are 1.2 GB: take a larger one"):
        require_room(plan, step.recipe)


@pytest.mark.slow
def test_settings_that_are_given_are_kept(step):
    assert chosen(step, 4, False, 2.0, batch_size=2) == (2, False, True)
    assert chosen(step, 4, False, 2.0, recompute=True) == (8, True, True)
    assert chosen(step, 4, False, 2.0, recompute=True, card=False) == (4, True, True)
    assert chosen(step, 4, False, 2.0, processes=8) == (2, False, True)


# The targets
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "length", "rank", "card"),
    [
        pytest.param("llama-2-7b", 2048, 2, 16 * 10**9, id="7b"),
        pytest.param("llama-2-70b", 4096, 8, 80 * 10**9, id="70b"),
    ],
)
def test_the_recipes_of_the_paper_fit_one_card(name, length, rank, card):
    config, _ = shape(name)
    step = step_of(name, None, length=length, rank=rank)
    parts = step.parts(1, True)
    tracked = tracked_whole(name, length, rank)
    assert sum(parts.values()) == pytest.approx(tracked, rel=0.15)
    quantised = weight_bytes(build_empty(config, torch.bfloat16), "nf4")
    assert tracked - parts["weights"] + quantised < usable(card)


@pytest.mark.slow
def test_the_forecast_takes_the_recipe_of_the_paper():
    config, _ = shape("llama-2-7b")
    plan = sh.memory_forecast(config, "heal", drop=8, device_memory="16GB")
    assert (plan.micro_batch, plan.fits) == (1, True)
    assert sh.memory_forecast(config, "heal", drop=30, device_memory="80GB").micro_batch == 4


@pytest.mark.parametrize(
    "name",
    mostly_slow(["mamba2", "bamba", "mixtral", "dots3_note_text"], quick=["mamba2", "mixtral"]),
)
def test_what_is_plain_without_a_rehearsal_is_so(name):
    config = small_config(name)
    if name == "mixtral":
        config.num_hidden_layers = 3
    recipe = resolved(config, 64, dtype="float32")
    assert is_small(config, recipe, 10**11)
    assert not is_small(config, recipe, 6 * 10**8)
    try:
        step = HealingStep(config, recipe)
    except ModelError:
        return  # it has no feed-forward part
    peak = sum(step.parts(4, False).values())
    assert not is_small(config, recipe, needed_device(peak))


def test_a_step_is_rehearsed_once(monkeypatch):
    monkeypatch.setattr(memory, "_LAST", {})
    options = {"room": Room(10**11, card=True)}
    recipe = resolved(ONE_LAYER, 128)
    first = plan_healing(ONE_LAYER, recipe, **options)
    monkeypatch.setattr(memory, "HealingStep", None)
    assert plan_healing(ONE_LAYER, replace(recipe, batch_size=1), **options) == first
    assert plan_healing(ONE_LAYER, replace(recipe, rank=3), **options).peak_bytes is None


@pytest.mark.slow
def test_an_objective_with_a_teacher_has_it_beside_the_cut():
    recipe = resolved(LLAMA, 128, dtype="bfloat16")
    options = {"room": Room(10**11, card=True), "batch_size": 4, "recompute": False}
    alone = plan_healing(LLAMA, recipe, **options).parts
    parts = plan_healing(LLAMA, replace(recipe, objective="kd"), **options, uncut_layers=6).parts
    assert "uncut model" not in alone
    assert parts["uncut model"] == 2 * parts["weights"] == 2 * alone["weights"]
    states = 4 * recipe.max_length * LLAMA.hidden_size * 2
    assert parts[memory.PARTS[-1]] - alone[memory.PARTS[-1]] >= states


@pytest.mark.parametrize(("packing", "share", "padded"), [
    (True, None, False), (False, None, True), (True, 0.5, True), (True, 1.0, True),
])  # fmt: skip
def test_answers_are_rehearsed_with_the_mask_of_their_padding(monkeypatch, packing, share, padded):
    step = HealingStep(ONE_LAYER, replace(resolved(ONE_LAYER, 64, packing=packing), share=share))
    seen = []
    monkeypatch.setattr(step._rehearsal, "run", lambda _, *, padded: seen.append(padded) or 1)
    step.run(1, recompute=False)
    assert seen == [padded]


@pytest.mark.parametrize("answers", mostly_slow([True, False], [True]))
def test_a_forecast_rehearses_what_a_healing_on_answers_does(monkeypatch, answers):
    seen, make = [], HealingStep.__init__

    def watched(step, config, recipe, **options):
        seen.append(recipe.is_padded)
        make(step, config, recipe, **options)

    monkeypatch.setattr(HealingStep, "__init__", watched)
    monkeypatch.setattr(memory, "_LAST", {})
    recipe = Recipe(packing=True, max_length=64)
    sh.memory_forecast(ONE_LAYER, recipe=recipe, answers=answers, device_memory="16GB")
    assert seen == [answers]
