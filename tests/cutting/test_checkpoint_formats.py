"""Quantised formats, layers for multi-token prediction, and names that follow the survivors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

import shallower as sh
from shallower import ModelError
from shallower.cutting import checkpoint
from shallower.cutting.tensor_names import check_alike, find_prefix
from tests.conftest import tiny_llama
from tests.cutting.checkpoints import DROPPED, assert_refused, edit_json, read_json, stored
from tests.families import small_config

SURVIVORS = [0, 2, 5]


# Formats that nothing here can load: renamed and copied.
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FORMATS = {
    "gptq": {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    },
    "awq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "fp8": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
    "compressed-tensors": {
        "weight_packed": torch.int32,
        "weight_scale": torch.bfloat16,
        "weight_shape": torch.int64,
    },
}


def make_quantised(folder, method, config, plain_layers=()):
    """A tiny Llama some of whose linear layers are, by name, quantised by some tool."""
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(folder)
    weights = {}
    for name, value in model.state_dict().items():
        module, _, _ = name.rpartition(".")
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        if not module.endswith(LINEARS) or layer in plain_layers:
            weights[name] = value.contiguous()
            continue
        for position, (leaf, dtype) in enumerate(FORMATS[method].items()):
            content = torch.full((int(layer) + 1, 8), position + 1).to(dtype)
            weights[f"{module}.{leaf}"] = content
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    quantisation = {"quant_method": method, **config}
    edit_json(folder / "config.json", quantization_config=quantisation)
    return folder


@pytest.mark.parametrize("method", FORMATS)
def test_other_quantised_formats_are_renamed_and_copied(method, tmp_path):
    before = stored(make_quantised(tmp_path / "source", method, {"bits": 4}))
    sh.prune(tmp_path / "source", DROPPED, tmp_path / "cut", max_shard_size=3000)
    expected = {}
    for name, tensor in before.items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            if int(layer) not in SURVIVORS:
                continue
            name = f"model.layers.{SURVIVORS.index(int(layer))}.{rest}"
        expected[name] = tensor
    assert stored(tmp_path / "cut") == expected
    config = read_json(tmp_path / "cut" / "config.json")
    assert config["quantization_config"] == {"quant_method": method, "bits": 4}


def test_modules_that_a_quantisation_config_names_are_renumbered(tmp_path):
    listed = [
        "lm_head",
        "model.layers.1.mlp",
        "model.layers.2.mlp.down_proj",
        "layers.5",
        "re:.*mlp.*",
    ]
    kept = ["lm_head", "model.layers.1.mlp.down_proj", "layers.2", "re:.*mlp.*"]
    keys = ["modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers"]
    quantisation = {
        "weights": "model.layers.5",
        **dict.fromkeys(keys, listed),
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["model.layers.4.x", "layers.2.y"]],
        "config_groups": {
            "group_0": {"targets": ["model.layers.3.mlp", "layers.4"], "weights": {"num_bits": 4}},
            "group_1": {"targets": ["Linear", "model.layers.5.mlp"], "weights": None},
        },
        "extra_config": {"model.layers.3.mlp": {"bits": 8}, "model.layers.2.mlp": {"bits": 16}},
    }
    source = make_quantised(tmp_path / "source", "gptq", quantisation, plain_layers="02")
    (source / "quantize_config.json").write_text(json.dumps({"modules_to_not_convert": listed}))
    sh.prune(source, DROPPED, tmp_path / "cut")
    edited = read_json(tmp_path / "cut" / "config.json")["quantization_config"]
    assert edited == {
        "quant_method": "gptq",
        "weights": "model.layers.5",
        **dict.fromkeys(keys, kept),
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["layers.1.y"]],
        "config_groups": {
            "group_1": {"targets": ["Linear", "model.layers.2.mlp"], "weights": None}
        },
        "extra_config": {"model.layers.1.mlp": {"bits": 16}},
    }
    beside = read_json(tmp_path / "cut" / "quantize_config.json")
    assert beside == {"modules_to_not_convert": kept}


@pytest.mark.parametrize(
    "config",
    [
        {"ignore": [r"re:.*layers\.2\..*"]},
        {"dynamic": {r"-:model\.layers\.[0-2]\..*": {}}},
        {"dynamic": {r".*\.2\..*down.*": {"bits": 8}}},
        {"exclude_modules": ["lm_head", "model.layers.5*"]},
        {"config_groups": {"g": {"targets": [r"re:model\.layers\.5\.mlp.*"]}}},
    ],
)
def test_patterns_that_tell_layers_apart_are_refused(tmp_path, config):
    source = make_quantised(tmp_path / "source", "gptq", config)
    assert_refused(ModelError, "distinguishes layers by number", source, tmp_path / "cut")
    sh.prune(source, [5], tmp_path / "cut")


def test_layers_for_multi_token_prediction_stay_behind_the_others(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "cut"
    model = AutoModelForCausalLM.from_config(small_config("deepseek_v3"))
    model.save_pretrained(whole)
    tensors = load_file(whole / "model.safetensors")
    last = {name: value for name, value in tensors.items() if name.startswith("model.layers.7.")}
    extra = {name.replace(".7.", ".8.", 1): value + 1 for name, value in last.items()}
    extra["model.layers.8.eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors | extra, whole / "model.safetensors", metadata={"format": "pt"})
    _rewrite_config(whole, num_nextn_predict_layers=0)
    with pytest.raises(ModelError, match=r"also has model\.layers\.8"):
        checkpoint.prepare(whole, [2, 3])
    _rewrite_config(whole, num_nextn_predict_layers=1)
    sh.prune(whole, [2, 3], out)
    cut = load_file(out / "model.safetensors")
    for name, value in extra.items():
        assert torch.equal(cut[name.replace(".8.", ".6.", 1)], value)
    assert not any(name.startswith(("model.layers.7.", "model.layers.8.")) for name in cut)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (6, 1)


def _rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What lies beside the weights.
def test_the_config_is_edited_and_not_rewritten(copied, tmp_path):
    edit_json(
        copied / "config.json", custom={"of": ["mine", 1]}, per_layer=[0, 1, 2, 3, 4, 5], é="ü"
    )
    before = read_json(copied / "config.json")
    sh.prune(copied, DROPPED, tmp_path / "cut")
    after = read_json(tmp_path / "cut" / "config.json")
    assert list(after) == list(before)
    assert after == {**before, "num_hidden_layers": 3, "per_layer": [0, 2, 5]}


def test_layers_are_found_by_the_names_of_tensors():
    def named(*prefixes, count=3):
        return [f"{prefix}.{i}.w" for prefix in prefixes for i in range(count)]

    path = "model.language_model.layers"
    for prefixes, found in [
        (["model.language_model.layers", "layers"], "model.language_model.layers."),
        (["layers", "vision.blocks"], "layers."),
        (["language_model.model.layers", "vision.blocks"], "language_model.model.layers."),
        (["language_model.model.blocks", "vision.blocks"], "language_model.model.blocks."),
        (["0.model.layers", "vision.blocks"], "0.model.layers."),
    ]:
        assert find_prefix(named(*prefixes), path, 3) == found
    with pytest.raises(ModelError, match=r"no tensors of the layers .*: a.layers., b.layers."):
        find_prefix(named("a.layers", "b.layers"), path, 3)
    with pytest.raises(ModelError, match="nothing"):
        find_prefix(["model.norm.weight", *named("vision.blocks")], path, 3)


def test_layers_may_be_quantised_or_not_but_not_incomplete():
    packed = {"q.qweight": "I32", "q.scales": "F16"}
    plain = {"q.weight": "BF16"}
    fp8 = {"q.weight": "F8_E4M3", "q.weight_scale_inv": "F32"}
    nf4 = {"q.weight": "U8", "q.weight.absmax": "F32", "q.weight.quant_state.nf4": "U8"}
    for layers in ([packed, plain], [plain, fp8], [nf4, plain]):
        check_alike(layers, ["same", "same"])
    for whole in (packed, fp8, nf4):
        poor = dict(list(whole.items())[:1])
        with pytest.raises(ModelError, match="layer 1 lacks the tensor q"):
            check_alike([whole, poor], ["same", "same"])
        with pytest.raises(ModelError, match="layer 1 lacks the tensor"):
            check_alike([{**whole, "k.weight": "F32"}, whole], ["same", "same"])
        check_alike([whole, poor], ["attention", "other"])
