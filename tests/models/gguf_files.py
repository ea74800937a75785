"""GGUF files to load."""

import numpy as np
from gguf import GGUFWriter
from transformers.convert_slow_tokenizer import bytes_to_unicode

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
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(BYTES)
    writer.add_token_types([1] * 256 + [3] * 4 + [1])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    for name, array in tensors(model or wide_llama()):
        if left_out not in name:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
