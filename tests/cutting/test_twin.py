"""Cuts that a config can describe, and those that it cannot."""

import copy

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
    Zamba2Config,
    Zamba2ForCausalLM,
)

import shallower as sh
from shallower.cutting.twin import built_from
from tests.conftest import mostly_slow
from tests.cutting.tiny_models import (
    GATED,
    HEADS,
    MOE,
    SIZES,
    WINDOWS,
    assert_stock_loads_the_same,
    build,
    logits_of,
    portrait,
    skipping,
)

LATENT = {
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    **MOE,
    "first_k_dense_replace": 1,
}
PERIODIC = {**GATED, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2}
UNDESCRIBABLE = {
    "attention every so often": (JambaForCausalLM, JambaConfig, PERIODIC, [2, 3]),
    "a constant of the place": (DiffLlamaForCausalLM, DiffLlamaConfig, GATED, [2]),
    "a scale of the place": (
        GPT2LMHeadModel,
        GPT2Config,
        {**SIZES, "scale_attn_by_inverse_layer_idx": True},
        [1],
    ),
}


@pytest.mark.parametrize("case", UNDESCRIBABLE)
def test_a_cut_that_the_config_cannot_describe_is_refused_and_nothing_changes(case):
    *blueprint, cut = UNDESCRIBABLE[case]
    model = build(*blueprint)
    before, whole = portrait(model), logits_of(model)
    with pytest.raises(sh.ModelError, match=r"cannot describe this cut|cannot be built"):
        sh.drop_layers(model, cut)
    assert portrait(model) == before
    with pytest.raises(sh.ModelError), sh.without_layers(model, cut):
        pytest.fail("the body ran")
    assert portrait(model) == before
    assert torch.equal(logits_of(model), whole)


EXPERTS = {"n_routed_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"}
DEPTH_SCALED = {
    **{key: value for key, value in LATENT.items() if key not in EXPERTS | MOE.keys()},
    "scale_depth": 1.4,
}
DESCRIBABLE = {
    "beside the dense layers": (DeepseekV3ForCausalLM, DeepseekV3Config, LATENT, [2, 4]),
    "the only dense layer": (DeepseekV3ForCausalLM, DeepseekV3Config, LATENT, [0]),
    "attention every so often": (JambaForCausalLM, JambaConfig, PERIODIC, [0, 1, 2]),
    "indices of layers": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**HEADS, **MOE, "mlp_only_layers": [1, 4], "decoder_sparse_step": 1},
        [0, 2],
    ),
    "a scale by the number of layers": (MiniCPM3ForCausalLM, MiniCPM3Config, DEPTH_SCALED, [1, 2]),
}


@pytest.mark.parametrize(
    "case",
    mostly_slow(DESCRIBABLE, ["the only dense layer", "indices of layers"]),
)
def test_a_cut_that_the_config_can_describe_otherwise_is_made(case, tmp_path):
    *blueprint, cut = DESCRIBABLE[case]
    model = build(*blueprint)
    expected = skipping(model, cut)
    sh.drop_layers(model, cut)
    assert torch.equal(logits_of(model), expected)
    assert_stock_loads_the_same(model, tmp_path / "cut")


PER_LAYER = {**HEADS, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100}
FULL = {**PER_LAYER, "layer_types": ["full_attention"] * 6}
HYBRID = {
    **HEADS,
    **MOE,
    "num_experts": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
WHOLE_OR_NOTHING = {
    "inputs of every layer in one table (gemma3n)": (
        Gemma3nForCausalLM,
        Gemma3nTextConfig,
        {**FULL, "intermediate_size": [48] * 6, "activation_sparsity_pattern": [0.0] * 6}
        | {"altup_num_inputs": 2, "laurel_rank": 8, "num_kv_shared_layers": 0},
        [2, 3],
    ),
    "inputs of every layer in one table (gemma4)": (
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        {**FULL, "num_kv_shared_layers": 0},
        [2, 3],
    ),
    "layers that share weights (zamba2)": (
        Zamba2ForCausalLM,
        Zamba2Config,
        {
            **GATED,
            "layers_block_type": ["mamba", "hybrid"] * 3,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "num_mem_blocks": 1,
            "mamba_ngroups": 1,
        },
        [3],
    ),
    "heads of another size in some layers (gemma4)": (
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        {**HEADS, **WINDOWS, "hidden_size_per_layer_input": 0, "global_head_dim": 16},
        [1, 2],
    ),
    "the last layer with attention (qwen3-next)": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {**HYBRID, "layer_types": ["full_attention"] + ["linear_attention"] * 5},
        [0],
    ),
}


@pytest.mark.parametrize("case", WHOLE_OR_NOTHING)
def test_a_cut_that_reaches_beyond_the_layers_is_right_or_refused(case):
    *blueprint, cut = WHOLE_OR_NOTHING[case]
    model = build(*blueprint)
    before, whole, expected = portrait(model), logits_of(model), skipping(model, cut)
    try:
        sh.drop_layers(model, cut)
    except sh.ModelError:
        assert portrait(model) == before
        assert torch.equal(logits_of(model), whole)
    else:
        assert torch.equal(logits_of(model), expected)


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
