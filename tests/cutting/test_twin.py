"""Cuts that a config can describe, and those that it cannot."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)

import shallower as sh
from shallower.cutting.twin import built_from
from tests.conftest import mostly_slow
from tests.cutting.tiny_models import (
    HEADS,
    WINDOWS,
    assert_stock_loads_the_same,
    logits_of,
    portrait,
    skipping,
)
from tests.families import DROP_SETS, REFUSED, random_model, small_config, small_weights

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
