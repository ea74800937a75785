"""The peak of a step as torch's own MemTracker counts it; and shapes of models, by config."""

import functools
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
)

from shallower.healing.training import recompute_activations
from shallower.models.architecture import find_layers


def _llama(width, wide, layers, heads, keys):
    return LlamaConfig(
        vocab_size=32_000, hidden_size=width, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, max_position_embeddings=4096,
    )  # fmt: skip


GATED = ["gate_proj", "up_proj", "down_proj"]

SHAPES = {
    "llama-2-7b": (_llama(4096, 11_008, 32, 32, 32), GATED),
    "llama-2-13b": (_llama(5120, 13_824, 40, 40, 40), GATED),
    "llama-2-70b": (_llama(8192, 28_672, 80, 64, 8), GATED),
    "qwen2.5-7b": (
        Qwen2Config(
            vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        ),
        GATED,
    ),
    "phi-2": (
        PhiConfig(
            vocab_size=51_200, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=32,
            num_attention_heads=32, partial_rotary_factor=0.4,
        ),
        ["fc1", "fc2"],
    ),
    "mistral-7b": (MistralConfig(), GATED),
    "gemma-2-2b": (
        Gemma2Config(
            vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
            num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        ),
        GATED,
    ),
    "gpt2-xl": (GPT2Config(n_embd=1600, n_layer=48, n_head=25), [r"mlp.c_fc", r"mlp.c_proj"]),
    "falcon-7b": (FalconConfig(), ["dense_h_to_4h", "dense_4h_to_h"]),
}  # fmt: skip
"""Configs by name, with the names of the linear maps that are adapted."""

ATTENTION = {
    "llama-2-7b": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2-xl": ["attn.c_attn", "attn.c_proj"],
}
"""Names of the linear maps of an attention."""


def shape(name, layers=None):
    """A shape with fewer layers, and what is adapted."""
    config, names = SHAPES[name]
    if layers is None:
        return config, names
    values = {**config.to_dict(), "num_hidden_layers": layers, "n_layer": layers}
    values.pop("layer_types", None)
    return type(config)(**values), names


class _Tracker(MemTracker):
    """The tracker for parameters that require no gradient, on which it cannot put its hooks."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    def __enter__(self):
        """It warns of functions that are modules within one another, as those of kernels are."""
        warnings.filterwarnings("ignore", ".*module hierarchy tracking")
        return super().__enter__()


def _faked(model):
    """The model on the CPU, on fake tensors; called in a fake mode."""
    made = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, value in place.items():
                if value is not None and id(value) not in made:
                    new = torch.empty(value.shape, dtype=value.dtype)
                    if isinstance(value, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=value.requires_grad)
                    made[id(value)] = new, value
                if value is not None:
                    place[name] = made[id(value)][0]
    return model


def _loss(model, states):
    """The cross-entropy of a few tokens at a time; their logits are made anew in the backward."""
    head = model.get_output_embeddings()

    def of_some(rows):
        expected = torch.zeros(len(rows), dtype=torch.long)
        logits = functional.linear(rows, head.weight, head.bias)  # no module's hook runs twice
        return functional.cross_entropy(logits, expected, reduction="sum")

    parts = states.flatten(0, 1).split(2**25 // len(head.weight))
    return sum(checkpoint(of_some, rows, use_reentrant=False) for rows in parts)


@functools.cache
def tracked_healing(name, layers, batch, length, rank, recompute, *, attention=False):
    """The peak of a step in bytes: weights in bfloat16, adapters, and Adam's two moments."""
    config, names = shape(name, layers)
    names = names + ATTENTION[name] if attention else names
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM", r=rank, lora_alpha=rank, lora_dropout=0.05,
                target_modules=names, fan_in_fan_out=name.startswith("gpt2"),
            ),
        )  # fmt: skip
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    adapted.train()
    if recompute:
        recompute_activations(model, True)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True):
        _faked(adapted)
        ids = torch.zeros(batch, length, dtype=torch.long)
        tracker = _Tracker()
        tracker.track_external(adapted)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                states = find_layers(model).runner(input_ids=ids, use_cache=False)[0]
                loss = _loss(model, states)
            del states
            loss.backward()
    moments = sum(8 * p.numel() for p in trained)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] + moments


@functools.cache
def tracked_forward(name, layers, batch, length, logits):
    """The peak of a forward without gradients in bytes, and of the first logits if asked for."""
    config, _ = shape(name, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _faked(model)
        ids = torch.zeros(batch, length, dtype=torch.long)
        head = model.get_output_embeddings()
        tracker = _Tracker()
        tracker.track_external(model)
        with tracker, torch.no_grad():
            states = find_layers(model).runner(input_ids=ids, use_cache=False)[0]
            if logits:
                functional.linear(states.flatten(0, 1)[: 2**26 // len(head.weight)], head.weight)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
