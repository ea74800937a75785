"""Cuts in memory against forwards that skip the layers, and those that no config describes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)

import shallower as sh
from shallower.cutting.twin import built_from
from shallower.healing.training import recompute_activations
from shallower.models.identity import identify
from tests.conftest import mostly_slow, tiny_llama
from tests.cutting.tiny_models import (
    GATED,
    HEADS,
    QWEN3,
    WINDOWS,
    assert_stock_loads_the_same,
    build,
    logits_of,
    numbers_in,
    portrait,
    reload,
    skipping,
)
from tests.families import DROP_SETS, REFUSED, random_model, small_config, small_weights


@settings(max_examples=settings.default.max_examples // 3)
@given(st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_without_layers_is_the_skipped_model_and_then_the_old_one(llama_with_lists, dropped):
    model = llama_with_lists
    before, whole, expected = portrait(model), logits_of(model), skipping(model, dropped)
    with sh.without_layers(model, dropped):
        assert torch.equal(logits_of(model), expected)
        assert model.config.num_hidden_layers == 6 - len(dropped)
    assert portrait(model) == before
    assert torch.equal(logits_of(model), whole)


@pytest.fixture(scope="module")
def llama_with_lists():
    return build(*QWEN3)


def test_without_layers_restores_when_the_body_raises(llama_with_lists):
    before = portrait(llama_with_lists)
    error = RuntimeError("of the body")
    with pytest.raises(RuntimeError) as caught, sh.without_layers(llama_with_lists, [0, 3]):
        raise error
    assert caught.value is error
    assert portrait(llama_with_lists) == before


def test_without_layers_can_be_nested(llama_with_lists):
    model = llama_with_lists
    before, expected = portrait(model), skipping(model, [0, 2, 4])
    with sh.without_layers(model, [0, 4]):
        between = portrait(model)
        with sh.without_layers(model, [1]):
            assert torch.equal(logits_of(model), expected)
        assert portrait(model) == between
    assert portrait(model) == before


def test_without_layers_restores_also_what_the_body_dropped(llama):
    before, whole = portrait(llama), logits_of(llama)
    with sh.without_layers(llama, [0]):
        sh.drop_layers(llama, [0])
    assert portrait(llama) == before
    assert torch.equal(logits_of(llama), whole)


def test_what_is_saved_within_without_layers_is_the_cut_model(llama, tmp_path):
    with sh.without_layers(llama, [2, 3]):
        assert_stock_loads_the_same(llama, tmp_path / "cut")


@pytest.mark.parametrize("layers", [range(6), [], [6], [1, 1], [True], "1"], ids=repr)
def test_layers_that_cannot_be_dropped_are_refused_and_nothing_changes(llama, layers):
    before, whole = portrait(llama), logits_of(llama)
    with pytest.raises(sh.LayersError):
        sh.drop_layers(llama, layers)
    assert portrait(llama) == before
    assert torch.equal(logits_of(llama), whole)


def test_the_plan_is_of_the_uncut_model(llama):
    identity = identify(llama)
    plan = sh.drop_layers(llama, [0, 3, 4])
    assert plan.model == identity
    assert (plan.num_layers, plan.strategy) == (6, "manual")
    assert plan.blocks == (sh.Block(0, 1), sh.Block(3, 5))
    with pytest.raises(sh.PlanError):
        plan.check_model(identify(llama))


def test_two_cuts_in_succession_are_one(llama, tmp_path):
    expected = skipping(llama, [1, 2, 5])
    sh.drop_layers(llama, [1, 5])
    sh.drop_layers(llama, [1])
    assert torch.equal(logits_of(llama), expected)
    assert numbers_in(llama) == [{0}, {1}, {2}]
    assert_stock_loads_the_same(llama, tmp_path / "cut")


def test_all_layers_but_one_can_go(llama, tmp_path):
    expected = skipping(llama, [0, 1, 2, 3, 4])
    sh.drop_layers(llama, range(5))
    assert torch.equal(logits_of(llama), expected)
    assert_stock_loads_the_same(llama, tmp_path / "cut")
    with pytest.raises(sh.LayersError, match="at least one must stay"):
        sh.drop_layers(llama, [0])


def test_a_model_that_was_saved_can_still_be_cut(tmp_path):
    model = build(ApertusForCausalLM, ApertusConfig, GATED)
    expected = skipping(model, [2])
    sh.save_model(model, None, tmp_path / "whole")
    sh.drop_layers(model, [2])
    assert torch.equal(logits_of(model), expected)


def test_tied_embeddings_stay_tied(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    sh.drop_layers(model, [1, 4])
    assert_stock_loads_the_same(model, tmp_path / "cut")
    reloaded = reload(tmp_path / "cut")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_a_cut_of_a_model_in_training_with_checkpointing_leaves_its_modes(llama):
    recompute_activations(llama, True)
    llama.train()
    expected = skipping(llama, [2])
    sh.drop_layers(llama, [2])
    assert all(module.training for module in llama.modules())
    assert torch.equal(logits_of(llama), expected)


def spread(path, **places):
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    names += [f"model.layers.{i}" for i in range(6)]
    device_map = dict.fromkeys(names, "cpu") | places
    return AutoModelForCausalLM.from_pretrained(
        path, device_map=device_map, offload_folder=path / "offload"
    ).eval()


@pytest.fixture
def offloaded(tmp_path):
    """A model with layers 1 and 4 on disk."""
    tiny_llama().save_pretrained(tmp_path / "whole")
    return spread(tmp_path / "whole", **{"model.layers.1": "disk", "model.layers.4": "disk"})


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_the_device_map_of_a_cut_model_is_renumbered(offloaded, tmp_path):
    expected = skipping(tiny_llama(), [0, 2])
    sh.drop_layers(offloaded, [0, 2])
    places = [offloaded.hf_device_map[f"model.layers.{i}"] for i in range(4)]
    assert places == ["disk", "cpu", "disk", "cpu"]
    assert "model.layers.4" not in offloaded.hf_device_map
    assert offloaded.hf_device_map["model.norm"] == "cpu"
    assert torch.equal(logits_of(offloaded), expected)
    sh.save_model(offloaded, None, tmp_path / "cut")
    assert torch.equal(logits_of(reload(tmp_path / "cut")), expected)


SCATTERED = DROP_SETS["scattered"]


@pytest.mark.parametrize("name", ["jamba", "diffllama", "gpt2, attention scaled by layer"])
def test_a_cut_that_the_config_cannot_describe_is_refused_and_nothing_changes(name):
    model = random_model(name)
    before, whole = portrait(model), logits_of(model)
    with pytest.raises(sh.ModelError, match=REFUSED[name]["scattered"]):
        sh.drop_layers(model, SCATTERED)
    assert portrait(model) == before
    with pytest.raises(sh.ModelError), sh.without_layers(model, SCATTERED):
        pytest.fail("the body ran")
    assert portrait(model) == before
    assert torch.equal(logits_of(model), whole)


def test_the_only_dense_layer_of_a_mixture_can_go(tmp_path):
    config = small_config("deepseek_v3")
    config.first_k_dense_replace = 1
    model = small_weights(AutoModelForCausalLM.from_config(config))
    expected = skipping(model, [0])
    sh.drop_layers(model, [0])
    assert torch.equal(logits_of(model), expected)
    assert_stock_loads_the_same(model, tmp_path / "cut")


def test_layers_spread_over_several_lists_are_refused():
    sizes = {"vocab_size": 100, "emb_dim": 32, "n_layers": 6, "n_heads": 4, "pad_index": 0}
    model = XLMWithLMHeadModel(XLMConfig(**sizes))
    with pytest.raises(sh.ModelError, match="spreads its layers"):
        sh.drop_layers(model, [2, 3])


def picture_model(vision_layers, vision_size):
    text = {key: value for key, value in HEADS.items() if not key.endswith("token_id")}
    vision = {
        "hidden_size": vision_size,
        "intermediate_size": 4 * vision_size,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(4)
    config = Gemma3Config(
        text_config={**text, **WINDOWS}, vision_config=vision, mm_tokens_per_image=4
    )
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("vision_layers", "vision_size"), mostly_slow([(3, 16), (6, 16), (6, 96)], [(6, 16)])
)
def test_a_cut_leaves_the_eyes_of_a_model_alone(vision_layers, vision_size, tmp_path):
    model = picture_model(vision_layers, vision_size)
    text_layers = model.model.language_model.layers
    kept = [text_layers[i] for i in (0, 1, 4, 5)]
    sh.drop_layers(model, [2, 3])
    assert list(model.model.language_model.layers) == kept
    assert model.config.text_config.num_hidden_layers == 4
    assert model.config.vision_config.num_hidden_layers == vision_layers
    assert len(model.model.vision_tower.encoder.layers) == vision_layers
    sh.save_model(model, None, tmp_path / "cut")
    _, info = Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "cut", output_loading_info=True
    )
    assert not any(info.values())


def test_a_config_is_built_once_and_no_cut_changes_what_another_is_compared_with(llama):
    config = copy.deepcopy(llama.config)
    assert built_from(llama, config) is built_from(llama, copy.deepcopy(config))
    config.hidden_act = "gelu"
    assert built_from(llama, config) is not built_from(llama, llama.config)
    before = dict(llama.all_tied_weights_keys)
    with sh.without_layers(llama, [1]):
        llama.all_tied_weights_keys["lm_head.weight"] = "model.embed_tokens.weight"
    assert llama.all_tied_weights_keys == before
    with sh.without_layers(llama, [2]):
        assert llama.all_tied_weights_keys == before
