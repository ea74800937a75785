"""GGUF files to load."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from tests.models.checkpoints import wide_llama

# GGUF
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
BYTES = [*bytes_to_unicode().values(), "<unk>", "<s>", "</s>", "<pad>", "ab"]


def interleaved(weight, heads):
    """The order of rotary rows in GGUF."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)


def tensors(model):
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            array = interleaved(array, heads) if part in name else array
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        yield name, np.ascontiguousarray(array)


def write_gguf(path, architecture="llama", model=None, left_out="nothing", merges=("a b",)):
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_block_count(4)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(261)
    _add_tokenizer(writer, merges)
    for name, array in tensors(model or wide_llama()):
        if left_out not in name:
            writer.add_tensor(name, array)
    return written(writer, path)


def _add_tokenizer(writer, merges):
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(BYTES)
    writer.add_token_types([1] * 256 + [3] * 4 + [1])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)


def written(writer, path):
    """Write all that was added, and give the path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SIZES = {
    "context_length": 128, "block_count": 4, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": 261,
}  # fmt: skip
LAYER_NORM = {"attention.layer_norm_epsilon": 1e-6}
FAMILIES = {
    "bloom": LAYER_NORM,
    "gemma2": {"attention.key_length": 16, "attention.sliding_window": 4},
    "gpt2": LAYER_NORM | {"feed_forward_length": 256},
    "lfm2": {"attention.head_count_kv": [0, 2, 0, 2], "shortconv.l_cache": 3},
    "mamba": {
        "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.inner_size": 128, "ssm.time_step_rank": 4,
    },
    "nemotron": {},
    "qwen2": {},
    "qwen2moe": {"expert_count": 4, "expert_used_count": 2},
    "qwen3moe": {"attention.key_length": 16, "expert_count": 4, "expert_used_count": 2},
    "qwen35": {
        "attention.key_length": 16, "ssm.time_step_rank": 4, "ssm.group_count": 2,
        "ssm.state_size": 16, "ssm.inner_size": 64, "ssm.conv_kernel": 4,
        "full_attention_interval": 4, "rope.dimension_count": 8,
        "rope.dimension_sections": [2, 1, 1, 0],
    },
    "starcoder2": LAYER_NORM,
}  # fmt: skip
"""Architectures whose tensors become weights in different ways, with sizes of their own."""


def write_family(path, architecture, **sizes):
    """Write a random model of an architecture, its matrices quantised."""
    kind, sizes = GGMLQuantizationType.Q8_0, SIZES | FAMILIES.get(architecture, {}) | sizes
    written(_described(path, architecture, sizes), path)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config.to_dict())
    kinds = {"qwen3_5_text": "qwen35"}
    names = get_gguf_hf_weights_map(model, processor, kinds.get(config.model_type))
    for target in dict(model.named_parameters()):  # which the table of gguf does not know
        if target.endswith(".dt_bias"):
            names[f"blk.{target.split('.')[2]}.ssm_dt.bias"] = target
    writer, rng = _described(path, architecture, sizes), np.random.default_rng(0)
    for name, target in names.items():
        shape = _shape(name, architecture, tuple(model.state_dict()[target].shape))
        array = rng.normal(0, 0.1, shape).astype(np.float32)
        if "ssm_a" in name:
            array = -np.exp(array)
        name = f"{name}.weight" if name.endswith("_exps") else name
        if array.ndim > 1 and shape[-1] % 32 == 0 and "conv" not in name and "ssm_a" not in name:
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    return written(writer, path)


def _described(path, architecture, sizes):
    writer = GGUFWriter(path, architecture)
    for key, value in sizes.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{architecture}.{key}", value)
    _add_tokenizer(writer, ("a b",))
    return writer


def _shape(name, architecture, shape):
    """The shape of a tensor in the file, by that of the weight."""
    if len(shape) == 3 and "conv" in name:
        return shape[0], shape[2]
    if name.endswith(("ffn_gate_exps", "ffn_up_exps")):
        return shape[0], shape[1] // 2, shape[2]
    if "ffn_gate_inp_shexp" in name:
        return shape[1:]
    turned = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")
    return shape[::-1] if architecture == "gpt2" and name.endswith(turned) else shape
