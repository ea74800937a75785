"""Tiny models with kinds of attention by layer, and logits with layers skipped."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import shallower as sh
from shallower.models.architecture import find_layers

IDS = torch.tensor([[(7 * i + 5) % 90 + 3 for i in range(12)], list(range(40, 52))])
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
QWEN3 = Qwen3ForCausalLM, Qwen3Config, {**HEADS, **WINDOWS, "use_sliding_window": True}
GEMMA3 = Gemma3ForCausalLM, Gemma3TextConfig, {**HEADS, **WINDOWS}
MISTRAL = MistralForCausalLM, MistralConfig, {**GATED, "sliding_window": 4}


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
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4, "pad_token_id": 0}
    cached = reloaded.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, reloaded.generate(IDS, use_cache=False, **options))
    assert torch.equal(cached, model.generate(IDS, use_cache=True, **options))
