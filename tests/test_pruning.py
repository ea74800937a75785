"""Cuts: the network with its layers skipped, in memory and from disk; or nothing at all."""

import copy
import json
import resource

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
    Zamba2Config,
    Zamba2ForCausalLM,
)

import shallower as sh
from conftest import tiny_llama
from shallower.models.architecture import find_layers
from shallower.models.identity import identify

IDS = torch.tensor([[(7 * i + 5) % 90 + 3 for i in range(12)], list(range(40, 52))])
CUTS = {"middle": [2, 3], "first": [0, 1], "deepest but last": [3, 4], "scattered": [0, 2, 5]}
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
HEADS = {**GATED, "head_dim": 8}
WINDOWS = {
    "sliding_window": 4,
    "layer_types": [
        "sliding_attention" if sliding else "full_attention" for sliding in (0, 1, 1, 0, 1, 0)
    ],
}
MOE = {
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
}

WITH_LISTS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**GATED, **WINDOWS, "use_sliding_window": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**HEADS, **WINDOWS, "use_sliding_window": True}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**HEADS, **WINDOWS}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**HEADS, **WINDOWS}),
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        {**GATED, **WINDOWS, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1, 0, 0]},
    ),
    "gpt-oss": (GptOssForCausalLM, GptOssConfig, {**HEADS, **WINDOWS, "num_local_experts": 4}),
}
OTHERS = {
    "mistral": (MistralForCausalLM, MistralConfig, {**GATED, "sliding_window": 4}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, SIZES),
    "opt": (OPTForCausalLM, OPTConfig, {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": (PhiForCausalLM, PhiConfig, {**SIZES, "intermediate_size": 48}),
    "bloom": (BloomForCausalLM, BloomConfig, SIZES),
    "falcon": (FalconForCausalLM, FalconConfig, SIZES),
    "qwen2-moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, {**GATED, **MOE, "num_experts": 4}),
}


def build(model_class, config_class, options):
    torch.manual_seed(4)
    return model_class(config_class(**options)).eval()


def logits_of(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def skipping(model, dropped, ids=IDS):
    """The logits of the whole model where the layers dropped give back their input."""

    def give_back(_module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layers = find_layers(model).modules
    handles = [layers[i].register_forward_hook(give_back, with_kwargs=True) for i in dropped]
    try:
        return logits_of(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def numbers_in(model):
    """What every layer takes for its place."""
    return [
        {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
        for layer in find_layers(model).modules
    ]


def portrait(model):
    """All that must be the same in a model that was left as it was."""
    return (
        model.config.to_json_string(use_diff=False),
        [id(layer) for layer in find_layers(model).modules],
        numbers_in(model),
        {name: (id(p), p.sum().item()) for name, p in model.state_dict(keep_vars=True).items()},
        copy.copy(getattr(model, "hf_device_map", None)),
    )


def reload(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert {kind: keys for kind, keys in info.items() if keys} == {}
    return model.eval()


def assert_stock_loads_the_same(model, path):
    """Saved and loaded by transformers alone: the same logits, also by way of the cache."""
    sh.save_model(model, None, path)
    reloaded = reload(path)
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), atol=1e-5, rtol=0)
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8, "pad_token_id": 0}
    cached = reloaded.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, reloaded.generate(IDS, use_cache=False, **options))
    assert torch.equal(cached, model.generate(IDS, use_cache=True, **options))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", [*WITH_LISTS, *OTHERS])
def test_a_cut_is_the_model_with_its_layers_skipped(family, cut):
    model = build(*(WITH_LISTS | OTHERS)[family])
    expected = skipping(model, CUTS[cut])
    whole = logits_of(model)
    plan = sh.drop_layers(model, CUTS[cut])
    assert plan.dropped == tuple(CUTS[cut])
    assert torch.equal(logits_of(model), expected)
    assert (expected - whole).abs().max() > 1e-3
    assert numbers_in(model) == [{i} for i in range(6 - len(CUTS[cut]))] or family == "opt"


@pytest.mark.parametrize("family", [*WITH_LISTS, *OTHERS])
def test_a_scattered_cut_comes_back_from_disk_by_stock_transformers(family, tmp_path):
    model = build(*(WITH_LISTS | OTHERS)[family])
    sh.drop_layers(model, CUTS["scattered"])
    assert_stock_loads_the_same(model, tmp_path / "cut")


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_llama_comes_back_from_disk_by_stock_transformers(cut, tmp_path):
    model = tiny_llama(initializer_range=0.2)
    expected = skipping(model, CUTS[cut])
    sh.drop_layers(model, CUTS[cut])
    assert torch.equal(logits_of(model), expected)
    assert_stock_loads_the_same(model, tmp_path / "cut")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", WITH_LISTS)
def test_lists_of_the_config_are_cut_by_surviving_layer(family, cut, tmp_path):
    model = build(*WITH_LISTS[family])
    options = WITH_LISTS[family][2]
    survivors = sh.drop_layers(model, CUTS[cut]).survivors
    sh.save_model(model, None, tmp_path / "cut")
    stored = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert stored["num_hidden_layers"] == model.config.num_hidden_layers == len(survivors)
    for name in {"layer_types", "no_rope_layers"} & options.keys():
        assert stored[name] == getattr(model.config, name) == [options[name][i] for i in survivors]


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
    return build(*WITH_LISTS["qwen3"])


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


def test_without_layers_refuses_before_it_changes_anything(llama):
    before = portrait(llama)
    with pytest.raises(sh.LayersError), sh.without_layers(llama, [6]):
        pytest.fail("the body ran")
    assert portrait(llama) == before


def test_what_is_saved_within_without_layers_is_the_cut_model(llama, tmp_path):
    with sh.without_layers(llama, [2, 3]):
        assert_stock_loads_the_same(llama, tmp_path / "cut")


@pytest.mark.parametrize(
    "layers",
    [
        range(6),
        [],
        [6],
        [-1],
        [1, 1],
        [range(1, 3), 2],
        [sh.Block(1, 4), sh.Block(3, 5)],
        [True],
        [0, False],
        [1.0],
        ["1"],
        "1",
        "",
        b"1",
        3,
        None,
        [None],
        [[1, 2]],
        [np.nan],
        [sh.Block(5, 7)],
    ],
    ids=repr,
)
def test_layers_that_cannot_be_dropped_are_refused_and_nothing_changes(llama, layers):
    before, whole = portrait(llama), logits_of(llama)
    with pytest.raises(sh.LayersError):
        sh.drop_layers(llama, layers)
    assert portrait(llama) == before
    assert torch.equal(logits_of(llama), whole)


@pytest.mark.parametrize(
    "layers",
    [
        [2, 3],
        [3, 2],
        range(2, 4),
        [range(2, 4)],
        sh.Block(2, 4),
        [sh.Block(2, 4)],
        np.array([2, 3]),
        {2, 3},
        iter([2, 3]),
        [range(3, 1, -1)],
        torch.tensor([2, 3]),
    ],
    ids=repr,
)
def test_layers_are_named_in_many_ways(llama, layers):
    expected = skipping(llama, [2, 3])
    plan = sh.drop_layers(llama, layers)
    assert plan.blocks == (sh.Block(2, 4),)
    assert plan.survivors == (0, 1, 4, 5)
    assert torch.equal(logits_of(llama), expected)


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


def test_training_goes_on_after_a_cut(llama):
    sh.drop_layers(llama, [2])
    llama.train()
    llama.activation_checkpointing_enable()
    llama(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in llama.parameters())


def test_a_cut_of_a_model_in_training_with_checkpointing_leaves_its_modes(llama):
    llama.activation_checkpointing_enable()
    llama.train()
    expected = skipping(llama, [2])
    sh.drop_layers(llama, [2])
    assert all(module.training for module in llama.modules())
    assert torch.equal(logits_of(llama), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_saved_as_it_is(llama, dtype, tmp_path):
    llama.save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype).eval()
    sh.drop_layers(model, [2, 3])
    sh.save_model(model, None, tmp_path / "cut")
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert reloaded.dtype == dtype
    assert torch.equal(logits_of(reloaded), logits_of(model))


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


@pytest.mark.parametrize("case", DESCRIBABLE)
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


@pytest.mark.parametrize(("vision_layers", "vision_size"), [(3, 16), (6, 16), (6, 96)])
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


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(sh.ModelError, match="no transformers config"):
        sh.drop_layers(nn.Linear(2, 2), [0])


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


def test_the_device_map_comes_back_after_without_layers(offloaded):
    before = dict(offloaded.hf_device_map)
    with sh.without_layers(offloaded, [0, 2]):
        assert offloaded.hf_device_map != before
    assert offloaded.hf_device_map == before


def test_a_model_loaded_onto_one_device_can_be_cut(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", device_map={"": "cpu"}).eval()
    expected = skipping(model, [2, 3])
    sh.drop_layers(model, [2, 3])
    assert torch.equal(logits_of(model), expected)


def test_a_checkpoint_is_saved_with_its_tokenizer_and_plan(llama, words, tmp_path):
    plan = sh.drop_layers(llama, [2, 3])
    sh.save_model(llama, words, tmp_path / "deep" / "cut", plan)
    folder = tmp_path / "deep" / "cut"
    assert sh.Plan.load(folder / "shallower_plan.json") == plan
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w5 w6 what")["input_ids"] == words("w5 w6 what")["input_ids"]
    assert torch.equal(logits_of(reload(folder)), logits_of(llama))


def test_without_tokenizer_and_plan_there_are_none(llama, tmp_path):
    sh.save_model(llama, None, tmp_path / "cut")
    names = {file.name for file in (tmp_path / "cut").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_tokenizer_saved_after_a_scan_truncates_no_more_than_before(llama, words, tmp_path):
    words.backend_tokenizer.no_truncation()
    sh.scan(llama, words, ["w1 w2 w3 w4 w5", "w6"], max_length=3)
    sh.evaluate_loss(llama, words, ["w1 w2 w3 w4 w5", "w6 w7"], max_length=3)
    sh.save_model(llama, words, tmp_path / "cut")
    stored = Tokenizer.from_file(str(tmp_path / "cut" / "tokenizer.json"))
    assert len(stored.encode("w1 w2 w3 w4 w5").ids) == 5


def test_a_folder_that_holds_something_is_refused_and_kept(llama, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.save_model(llama, None, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_an_empty_folder_is_filled(llama, tmp_path):
    (tmp_path / "cut").mkdir()
    sh.save_model(llama, None, tmp_path / "cut")
    assert [file.name for file in tmp_path.iterdir()] == ["cut"]
    reload(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_overwriting_replaces_what_is_there_and_nothing_else(llama, tmp_path, kind):
    other = tmp_path / "other"
    other.mkdir()
    (other / "note").write_text("mine")
    target = tmp_path / "cut"
    if kind == "folder":
        target.mkdir()
        (target / "note").write_text("old")
    elif kind == "file":
        target.write_text("old")
    else:
        target.symlink_to(other)
    with pytest.raises(sh.OutputError):
        sh.save_model(llama, None, target)
    sh.save_model(llama, None, target, overwrite=True)
    reload(target)
    assert not (target / "note").exists()
    assert (other / "note").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cut", "other"]


def test_a_place_beneath_a_file_is_refused(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(sh.OutputError):
        sh.save_model(llama, None, tmp_path / "file" / "cut")
    assert (tmp_path / "file").read_text() == "mine"


class BrokenTokenizer:
    def save_pretrained(self, folder):
        (folder / "half").write_text("half")
        raise RuntimeError("of the tokenizer")


def broken_plan():
    return sh.Plan(6, (sh.Block(2, 4),), versions={"made by": object()})


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("tokenizer", "plan", "error"),
    [(BrokenTokenizer(), None, RuntimeError), (None, broken_plan(), TypeError)],
)
def test_saving_that_fails_midway_leaves_all_as_it_was(
    llama, tmp_path, tokenizer, plan, error, overwrite
):
    if overwrite:
        sh.save_model(llama, None, tmp_path / "cut")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    sh.drop_layers(llama, [sh.Block(2, 4)])
    with pytest.raises(error):
        sh.save_model(llama, tokenizer, tmp_path / "cut", plan, overwrite)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert len(list(tmp_path.iterdir())) == len(before and [1])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_all_as_it_was(llama, tmp_path, overwrite):
    if overwrite:
        sh.save_model(llama, None, tmp_path / "cut")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(sh.OutputError, match="cannot write"):
            sh.save_model(llama, None, tmp_path / "cut", overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert len(list(tmp_path.iterdir())) == len(before and [1])


def test_weights_that_are_not_there_are_not_saved(tmp_path):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**GATED))
    with pytest.raises(sh.ModelError):
        sh.save_model(model, None, tmp_path / "cut")
    assert list(tmp_path.iterdir()) == []


def test_generation_settings_that_transformers_refuses_are_named(llama, tmp_path):
    llama.generation_config.temperature = 0.6
    with pytest.raises(sh.ShallowerError, match="temperature"):
        sh.save_model(llama, None, tmp_path / "cut")
    assert list(tmp_path.iterdir()) == []
