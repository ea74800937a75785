"""Every family of decoder-only models in transformers as a small random model, as data."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NUM_LAYERS = 8

DROP_SETS = {
    "middle": (3, 4),
    "first": (0, 1),
    "deepest but the last": (5, 6),
    "scattered": (1, 4, 6),
    "odd": (2,),
}

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "embedding_dim": 32, "intermediate_size": 48, "n_inner": 48,
    "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "ffn_hidden_size": 48, "dff": 48,
    "num_hidden_layers": NUM_LAYERS, "num_layers": NUM_LAYERS, "n_layer": NUM_LAYERS,
    "n_layers": NUM_LAYERS, "decoder_layers": NUM_LAYERS, "encoder_layers": NUM_LAYERS,
    "num_decoder_layers": NUM_LAYERS, "num_encoder_layers": NUM_LAYERS,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "kv_channels": 8, "rotary_dim": 4,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sliding_window": 4, "attention_chunk_size": 4,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "qk_head_dim": 8, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 8,
    "state_size": 4, "time_step_rank": 4, "mamba_d_state": 4, "mamba_d_conv": 4,
    "mamba_dt_rank": 4, "mamba_chunk_size": 4, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
}  # fmt: skip
"""Small sizes, by the keys that configs use."""

TOWER: dict[str, Any] = SIZES | {
    **dict.fromkeys(("hidden_size", "embed_dim", "hidden_dim", "out_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(("output_dim", "mlp_dim", "projection_dim", "num_position_embeddings"), 32),
    "num_key_value_heads": 4, "image_size": 28, "patch_size": 14, "window_size": 28,
    "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0, 1], "num_mel_bins": 16,
}  # fmt: skip
"""Small sizes of a tower."""

_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
_LATENT = {"num_key_value_heads": 4}
_DECODER = {"is_decoder": True}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INKLING: dict[str, Any] = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "sliding_window_size": 4, "d_rel": 4, "rel_extent": 8,
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    "global_head_dim": 16, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
}  # fmt: skip

_SECTIONED = (
    "glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text", "qwen2_5_vl_text",
    "qwen2_vl_text",
)  # fmt: skip
"""Texts whose places have three coordinates."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 3},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bamba": {**_MAMBA, "attn_layer_indices": [2, 5]},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "camembert": _DECODER,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "cpmant": {"dim_head": 8, "dim_ff": 48, "prompt_types": 4, "prompt_length": 4},
    "data2vec-text": _DECODER,
    "dbrx": {
        "rope_parameters": _ROPE,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "first_k_dense_replace": 3},
    "deepseek_v3": {**_LATENT, "first_k_dense_replace": 3},
    "deepseek_v32": {**_LATENT, "first_k_dense_replace": 3},
    "deepseek_v4": {
        "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 0,
    },
    "dory": {"n_input_layers": 3, "n_recurrent_layers": 3, "n_output_layers": 2},
    "dots1": {"first_k_dense_replace": 3, "num_key_value_heads": 4},
    "dots3_note_text": {
        **_LATENT, "shared_experts_intermediate_size": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 4, "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
        "swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 8,
    },
    "electra": _DECODER,
    "ernie": _DECODER,
    "ernie4_5_moe": {
        "moe_layer_start_index": 2, "moe_layer_end_index": 6, "moe_num_shared_experts": 1,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    "gemma4_text": {**_GEMMA4, "num_experts": None},
    "gemma4_unified_text": _GEMMA4,
    "glm4_moe": {"first_k_dense_replace": 3},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "window_size": 4},
    "granitemoehybrid": {
        **_MAMBA, "layer_types": ["linear_attention", "full_attention"] * 4,
        "shared_intermediate_size": 16,
    },
    "inkling2_loop_text": {
        **_INKLING, "unpadded_vocab_size": 120, "n_layers_per_attn_res_block": 2,
        "loop_layer_index_start": 2, "loop_layer_index_end": 6, "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "inkling2_text": {**_INKLING, "unpadded_vocab_size": 120, "n_layers_per_attn_res_block": 2},
    "inkling_text": _INKLING,
    "jamba": {
        "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {
        **_LATENT, "linear_head_dim": 8, "linear_num_heads": 4, "q_lora_rank": None,
    },
    "kolibri1": _LATENT,
    "kolibri1_1": {
        "head_dim": 16, "index_num_heads": 1, "index_pool_size": 64,
        "index_compression": 2, "index_num_local_tokens": 2, "index_num_sink_tokens": 1,
        "layer_types": ["sliding_attention", "indexed_attention"] * 4, "index_layers": [1, 3, 5],
        "kv_source_layers": [0, 1, 2, 3, 4, 3, 6, 7],
    },
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "llama4_text": {
        "intermediate_size_mlp": 48, "moe_layers": [1, 3, 5, 7], "no_rope_layers": [1, 1, 1, 0] * 2,
    },
    "longcat_flash": {**_LATENT, "head_dim": 4, "zero_expert_num": 2, "qk_head_dim": None},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "megatron-bert": _DECODER,
    "minicpm3": _LATENT,
    "minimax_m3_vl_text": {
        "dense_intermediate_size": 48, "shared_intermediate_size": 16, "intermediate_size": 16,
        "index_block_size": 4, "index_topk_blocks": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 4,
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6,
    },
    "mistral_large4_text": _LATENT,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 4,
        "chunk_size": 8, "moe_shared_expert_intermediate_size": 16,
    },
    "qwen2": {"use_sliding_window": True, "max_window_layers": 4},
    **{key: {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}} for key in _SECTIONED},
    "qwen2_moe": {"mlp_only_layers": [1, 4], "use_sliding_window": True, "max_window_layers": 4},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 4},
    "qwen3_moe": {"mlp_only_layers": [1, 4]},
    "qwen3_next": {"mlp_only_layers": [1, 4]},
    "qwen4_exp_text": {
        "hc_lowrank": 8, "ple_layer_ids": [1, 3], "ple_embed_dim": 32,
        "ngram_vocab_size_base": 64, "split_ngram_parts": 4, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "make_ngram_vocab_size_divisible_by": 4,
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 4},
    "rembert": {**_DECODER, "input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": {
        **_DECODER, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
        "pronunciation_vocab_size": 8, "shape_vocab_size": 8,
    },
    "roformer": _DECODER,
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "sarvam_mla": _LATENT,
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xlnet": {"d_inner": 48},
    "xlstm": {"num_blocks": None, "chunk_size": 8},
    "xmod": {**_DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {**_LATENT, "pad_token_id": None},  # loading sets the embedding of padding to zero
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 4, "n_mamba_heads": 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 4, "n_mamba_heads": 8,
        "adapter_rank": 4, "chunk_size": 8, "num_key_value_heads": 4,
    },
    "zaya": {
        "num_experts_per_tok": 1, "router_hidden_size": 16,
        "layer_types": ["hybrid", "hybrid_sliding"] * 4,
    },
}  # fmt: skip
"""What the sizes do not tell, and structure by layer where the default has none."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2, two kinds": ("gemma2", {"layer_types": ["sliding_attention", "full_attention"] * 4}),
    "gemma4_text, shared keys and values": (
        "gemma4_text", {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    ),
    "gemma4_text, experts": (
        "gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
    ),
    "gpt2, attention scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_oss, two kinds": ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 4}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, windowed": ("mistral", {"sliding_window": 4}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 16}),
    "qwen2_moe, every second": ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    "qwen3_moe, every second": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    "smollm3, some without RoPE": ("smollm3", {"no_rope_layers": [1, 1, 0, 1] * 2}),
}  # fmt: skip
"""Families with more structure by layer."""

UNTESTED = {
    **dict.fromkeys(
        ("blt", "fuyu", "gemma3", "gemma3n", "git", "got_ocr2", "moss_transcribe_diarize"),
        "a model of text in another one, which is tested where it has a name",
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant", "phi4_multimodal", "dots3_note"),
        "built around parts that are not text",
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody", "moshi"), "reads sound"),
    "hrm_text": "two stacks of layers that run in turn: no one list",
    "prophetnet": "its generation with a cache differs from that without, uncut",
    "reformer": "reversible layers of two streams",
    "xlm": "its layers are spread over several lists",
}
"""Model types that are not in the tests, with the reason."""


_MIDDLE, _FIRST, _DEEPEST, _SCATTERED, _ODD = DROP_SETS
_NO_ATTENTION = "no attention layer would be left"
_OTHER_STORE = "store_full_length_kv"

REFUSED: dict[str, dict[str, str]] = {
    "bailing_hybrid": {_DEEPEST: _NO_ATTENTION},
    "beam": dict.fromkeys(DROP_SETS, "attn_residual_add_idx"),
    "diffllama": dict.fromkeys(DROP_SETS, "lambda_init"),
    "gemma3n_text": dict.fromkeys((_MIDDLE, _DEEPEST, _SCATTERED), _OTHER_STORE),
    "gemma4_text, shared keys and values": {
        _MIDDLE: "no layer of full_attention would be left whose cache others share",
        _DEEPEST: _OTHER_STORE,
    },
    "gpt2, attention scaled by layer": dict.fromkeys(DROP_SETS, "attn.scaling"),
    "hy_v4": {_FIRST: "layer 2 shares the indexer of an earlier layer"},
    "inkling2_loop_text": {
        _MIDDLE: "message_input.query", _FIRST: "loop_layer_index_start",
        _DEEPEST: "loop_layer_index_end", _SCATTERED: "loop_layer_index_start",
        _ODD: "loop_layer_index_end",
    },
    "inkling2_text": {
        _FIRST: "attention_input", _SCATTERED: "is_block_boundary", _ODD: "is_block_boundary",
    },
    "jamba": {
        _MIDDLE: "attn_layer_period", _SCATTERED: "expert_layer_period",
        _ODD: "expert_layer_period",
    },
    "kolibri1_1": {_MIDDLE: "layer 5 shares the cache of layer 3"},
    "kimi_linear": dict.fromkeys((_MIDDLE, _SCATTERED), _NO_ATTENTION),
    "modernbert-decoder": {_FIRST: "attn_norm a Identity"},
    "qwen4_exp": {_FIRST: "ple_layer_index"},
    "qwen4_exp_text": {_FIRST: "ple_layer_index"},
    "rwkv": {_FIRST: "pre_ln"},
    "zaya": {_FIRST: "use_eda"},
}  # fmt: skip
"""The drop sets that no config of the family can express, with a word of the reason."""

FAST = [
    "deepseek_v3", "gemma4_text, shared keys and values", "gpt2, attention scaled by layer",
    "jamba", "llama, tied", "mixtral", "qwen3_next",
]  # fmt: skip
"""On every change: structures that differ most. All others are slow tests."""


MIXTURES = [
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "flint", "gemma4_text, experts", "glm4_moe", "glm4_moe_lite",
    "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_loop_text", "inkling2_text",
    "jamba", "kimi_linear", "kolibri1", "kolibri1_1", "laguna",
    "lara_mini", "lfm2_moe", "llama4_text", "mellum",
    "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "nemotron_h",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_moe, every second",
    "qwen3_next", "qwen4_exp_text", "sarvam_mla", "sarvam_moe", "solar_open",
]  # fmt: skip
"""The families whose experts can go."""

EXPERTS_STAY = {
    "deepseek_v4": "table that sends tokens to experts by their number",
    "inkling_text": "more than a part for each of 6 experts",
    "jetmoe": "expected one mixture a layer",
    "longcat_flash": "more than a part for each of 6 experts",
    "zaya": "more than a part for each of 6 experts",
}
"""The families whose experts stay, with a word of the reason."""

IS_OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 25)
"""Whether this is an older transformers than the one that the lists are of."""


def small_config(name: str) -> Any:
    """The config of a family or variant, small."""
    model_type, more = VARIANTS.get(name, (name, {}))
    return _small(model_type, more)


def with_towers(model_type: str) -> Any:
    """The config of a model of more than text, all of it small."""
    return _small(model_type, {}, towers=True)


def _small(kind: Any, more: dict[str, Any], *, towers: bool = False, is_tower: bool = False) -> Any:
    if IS_OLDER and isinstance(kind, str) and kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    cls = CONFIG_MAPPING[kind] if isinstance(kind, str) else kind
    keys = inspect.signature(cls).parameters
    given = {key: value for key, value in (TOWER if is_tower else SIZES).items() if key in keys}
    given |= OVERRIDES.get(cls.model_type, {}) | more
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        if towers:
            part = type(getattr(cls(), name))
        if towers or (name == "text_config" and part.model_type in CONFIG_MAPPING):
            given[name] = _small(part, {}, towers=towers, is_tower="text" not in name).to_dict()
    return cls(**given)


def families() -> list[str]:
    """All that are tested."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS} - set(UNTESTED))


WHOLE = [
    "aria", "aya_vision", "cohere2_vision", "cohere_compass", "cosmos3_omni", "deepseek_vl",
    "deepseek_vl_hybrid", "exaone4_5", "glm46v", "glm4v", "glm_ocr", "glmasr", "glmga",
    "granite_docling", "granite_speech", "granite_speech_plus", "hyperclovax_vision_v2",
    "idefics2", "idefics3", "inkling_mm_model", "internvl", "kimi_k25", "lfm2_vl", "lfm3_vl",
    "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision",
    "llava_onevision1_5", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl",
    "mistral3", "mistral4", "mistral_large4", "muse_glimmer", "omniasr", "ovis2", "ovis2_5",
    "paddleocr_vl", "paligemma", "pp_chart2table", "qianfan_ocr", "qwen2_5_omni_thinker",
    "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_asr", "qwen3_omni_moe_thinker", "qwen3_vl",
    "qwen3_vl_moe", "smolvlm", "step3p7", "unlimited_ocr", "video_llama_3", "video_llava",
    "vipllava", "voxtral",
]  # fmt: skip
"""The types of images and sound without a causal class, whose decoder is cut."""

WHOLE_REFUSED = {
    "blip": "layer_num",
    "diffusion_gemma": "depends on the number of layers",
    "idefics": "spreads its layers over several lists",
    "pi0": "no list of the decoder layers",
    "pi05": "no list of the decoder layers",
}
"""Those that are refused, with a word of the reason."""

SCALES = {"rwkv": 1e-4, "qwen3_5_moe_text": 2e-4}
"""Where the order of halvings that the model makes for float16 shows in its norms, and where
rounding grows: in float64, where it can be tried, the difference is 0."""


def random_model(name):
    torch.manual_seed(0)
    return small_weights(AutoModelForCausalLM.from_config(small_config(name)))


def small_weights(model):
    """Weights that keep all states of a size; biases and norms that are no zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            elif not any(part in key for part in ("A_log", "dt", "decay")):
                weight.add_(0.2 * noise)
    return model.eval()
