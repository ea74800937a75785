"""What healing adapts, in every family: the maps of the feed-forward parts, and nothing else."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from shallower import ModelError
from shallower.healing.training import add_adapters
from shallower.models.architecture import find_layers
from shallower.models.feed_forward import feed_forward_targets, is_linear
from shallower.settings.recipe import ModelFacts, Recipe
from tests.conftest import mostly_slow, tiny_llama
from tests.families import families, random_model, small_config

NOTHING_THERE = {"mamba", "mamba2", "falcon_mamba", "dbrx"}
SHARED = {"zamba", "zamba2"}
NAMES = {
    "llama, tied": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "mistral, windowed": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "phi": {"mlp.fc1", "mlp.fc2"},
    "phi3": {"mlp.gate_up_proj", "mlp.down_proj"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "opt": {"fc1", "fc2"},
    "bart": {"fc1", "fc2"},
    "falcon": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "bloom": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "bert": {"intermediate.dense", "output.dense"},
    "mixtral": {":mlp.experts.gate_up_proj", ":mlp.experts.down_proj"},
    "gpt_oss": {":mlp.experts.gate_up_proj", ":mlp.experts.down_proj"},
    "qwen3_next": {
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj", ":mlp.experts.gate_up_proj",
        ":mlp.experts.down_proj",
    },
    "nemotron_h": {
        "mixer.up_proj", "mixer.down_proj", "mixer.shared_experts.up_proj",
        "mixer.shared_experts.down_proj", ":mixer.experts.up_proj", ":mixer.experts.down_proj",
    },
    "jetmoe": {":mlp.input_linear.weight", ":mlp.output_linear.weight"},
    "rwkv": {"feed_forward.key", "feed_forward.receptance", "feed_forward.value"},
    "xlstm": {"ffn.proj_up_gate", "ffn.proj_up", "ffn.proj_down"},
}  # fmt: skip
FORBIDDEN = re.compile(
    r"attn|attention|mamba|ssm|conv|norm|router|adapter|indexer|lm_head|embed|bias|time_mix"
    r"|shared_expert_gate|\.gate(\.|$)"
)


def empty(name):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(small_config(name))


def inner(model, names):
    """Names below their layers, each once."""
    return {name.removeprefix(find_layers(model).path + ".").partition(".")[2] for name in names}


def shape(model, name):
    """(out, in) of a linear map."""
    module = model.get_submodule(name)
    return module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape


@pytest.mark.parametrize("name", mostly_slow(families(), quick=families()[::9]))
def test_every_family_has_targets_or_a_refusal(name):
    model = empty(name)
    if name in NOTHING_THERE:
        with pytest.raises(ModelError, match="no feed-forward part was found"):
            feed_forward_targets(model)
        return
    if name in SHARED:
        with pytest.raises(ModelError, match="are one weight"):
            feed_forward_targets(model)
        return
    targets = feed_forward_targets(model)
    everything = (*targets.modules, *targets.parameters)
    assert not [name for name in inner(model, everything) if FORBIDDEN.search(name)]
    assert len(set(everything)) == len(everything)
    width = find_layers(model).runner.config.get_text_config(decoder=True).hidden_size
    for target in targets.modules:
        out, given = shape(model, target)
        assert width in (out, given), target
        assert 1 not in (out, given), target
    for target in targets.parameters:
        assert width in model.get_parameter(target).shape[-2:], target
    numbers = {int(n.removeprefix(find_layers(model).path + ".").split(".")[0]) for n in everything}
    assert len(numbers) >= len(find_layers(model)) // 2
    if name in NAMES:
        found = inner(model, targets.modules) | {":" + n for n in inner(model, targets.parameters)}
        assert found == NAMES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_slow(families(), quick=families()[::9]))
def test_adapters_reach_the_loss_in_every_family(name):
    if name in NOTHING_THERE | SHARED:
        pytest.skip("refused")
    model = random_model(name)
    recipe = Recipe(rank=2, dtype="float32", dropout=0.0).resolve(ModelFacts("", 32, 9, None))
    targets = feed_forward_targets(model)
    adapted = add_adapters(model, targets, recipe, base="base")
    logits = adapted(input_ids=torch.arange(1, 65).reshape(2, 32), use_cache=False).logits
    logits.float().square().mean().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if "lora_B" in n}
    assert len(grads) == len(targets)
    silent = {n for n, g in grads.items() if g is None or not g.any()}
    # Layers of cross-attention are passed over where there is no picture.
    assert {n for n in silent if name != "mllama" or ".layers.3." not in n} == set()


@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "phi", "qwen3_next", "recurrent_gemma"])
def test_attention_is_added_when_asked_for(name):
    model = empty(name)
    without, added = feed_forward_targets(model), feed_forward_targets(model, attention=True)
    more = set(added.modules) - set(without.modules)
    assert set(without.modules) < set(added.modules)
    assert all(re.search(r"attn|attention|temporal_block", name) for name in more)
    assert added.parameters == without.parameters


def test_the_first_qwen_has_two_maps_of_one_name():
    model = empty("gpt2")
    for layer in find_layers(model).modules:
        layer.mlp.w1, layer.mlp.w2 = nn.Linear(32, 48), nn.Linear(32, 48)
        layer.mlp.c_proj = nn.Linear(48, 32)
        del layer.mlp.c_fc
    targets = feed_forward_targets(model)
    assert inner(model, targets.modules) == {"mlp.w1", "mlp.w2", "mlp.c_proj"}
    assert not targets.transposed
    assert feed_forward_targets(empty("gpt2")).transposed


class GptqLinear(nn.Module):
    """A quantiser's own linear map, no torch.nn.Linear."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 32, 48
        self.register_buffer("qweight", torch.zeros(4, 48, dtype=torch.int32))


def test_linear_maps_of_quantisers_are_known():
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    with torch.device("meta"):
        kinds = [Linear4bit(8, 8), Linear8bitLt(8, 8), GptqLinear(), nn.Linear(2, 2), Conv1D(2, 2)]
    assert all(is_linear(module) for module in kinds)
    assert not any(is_linear(module) for module in (nn.Embedding(2, 2), nn.Conv1d(2, 2, 1)))
    model = tiny_llama(2)
    model.model.layers[1].mlp.up_proj = GptqLinear()
    assert "model.layers.1.mlp.up_proj" in feed_forward_targets(model).modules
