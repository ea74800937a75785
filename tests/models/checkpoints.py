"""Models with lively weights, and their logits."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

CAUSAL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def lively(model):
    """Norms and biases unlike those of a fresh model, as a trained model has them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def wide_llama(**options):
    torch.manual_seed(6)
    return lively(LlamaForCausalLM(LlamaConfig(**WIDE, **options)))


def wide_qwen():
    """Has biases in its attention."""
    torch.manual_seed(6)
    return lively(Qwen2ForCausalLM(Qwen2Config(**WIDE)))
