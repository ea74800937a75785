"""Cuts on disk: the cut in memory, byte by byte; or nothing at all, whatever happens."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from contextlib import suppress

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    FineGrainedFP8Config,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import shallower as sh
from conftest import tiny_llama
from families import small_config
from shallower import LayersError, ModelError, OutputError, Plan, PlanError, checkpoint
from shallower.exports import EXPORT_FILES
from shallower.models.plain import VECTORS
from shallower.models.quantised import quantisation
from shallower.models.stored import Renumbering, check_alike, edit_config, find_prefix
from shallower.storage import partial_folder
from test_pruning import GATED, HEADS, OTHERS, WINDOWS, WITH_LISTS, build, logits_of
from test_storage import full_disk, tree

DROPPED = [1, 3, 4]
SURVIVORS = [0, 2, 5]


@pytest.fixture(scope="session")
def source(tmp_path_factory, words):
    """A random Llama of 6 layers in many shards, its tokenizer, and things beside them."""
    folder = tmp_path_factory.mktemp("stored") / "tiny"
    tiny_llama(initializer_range=0.2).save_pretrained(folder, max_shard_size="20KB")
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(source, tmp_path):
    """A copy of ``source`` to do harm to."""
    return shutil.copytree(source, tmp_path / "source")


Stored = namedtuple("Stored", "dtype shape content")


def stored(folder):
    """Every tensor of a checkpoint's files, as its bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, info in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in info["data_offsets"])
                assert name not in found
                found[name] = Stored(info["dtype"], info["shape"], raw[start:stop])
    return found


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**read_json(path), **changes}))


def stock(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_refused(error, words, source, out, layers=DROPPED, **options):
    before = tree(out.parent)
    with pytest.raises(error, match=words):
        sh.prune_checkpoint(source, layers, out, **options)
    assert tree(out.parent) == before


# The same cut as in memory.


@pytest.mark.parametrize("size", ["5GB", "30KB", 1])
def test_a_cut_on_disk_is_the_cut_in_memory(source, tmp_path, size):
    model, tokenizer = sh.load_model(source, dtype="float32")
    plan = sh.drop_layers(model, DROPPED)
    sh.save_model(model, tokenizer, tmp_path / "memory", plan)
    assert sh.prune_checkpoint(source, DROPPED, tmp_path / "disk", size) == plan
    disk = tmp_path / "disk"
    assert stored(disk) == stored(tmp_path / "memory")
    assert Plan.load(disk / "shallower_plan.json") == plan
    assert torch.equal(logits_of(stock(disk)), logits_of(model))
    assert AutoTokenizer.from_pretrained(disk)("w1 w2")["input_ids"] == [1, 2]
    files = sorted(disk.glob("*.safetensors"))
    if size == "5GB":
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (disk / "model.safetensors.index.json").exists()
    else:
        index = read_json(disk / "model.safetensors.index.json")
        places = {name: file.name for file in files for name in safe_open(file, "pt").keys()}  # noqa: SIM118
        assert index["weight_map"] == places
        total = sum(len(tensor.content) for tensor in stored(disk).values())
        assert index["metadata"] == {"total_size": total}
    for file in files:
        assert safe_open(file, "pt").metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == []


@pytest.mark.parametrize("family", [*WITH_LISTS, *OTHERS])
def test_families_are_cut_on_disk_as_in_memory(family, tmp_path):
    model = build(*(WITH_LISTS | OTHERS)[family])
    model.save_pretrained(tmp_path / "source")
    plan = sh.prune_checkpoint(tmp_path / "source", [0, 2, 5], tmp_path / "disk")
    memory = sh.drop_layers(model, [0, 2, 5])
    model.save_pretrained(tmp_path / "memory")
    assert stored(tmp_path / "disk") == stored(tmp_path / "memory")
    assert torch.equal(logits_of(stock(tmp_path / "disk")), logits_of(model))
    assert plan.model.fingerprint == memory.model.fingerprint
    before, after = (read_json(tmp_path / at / "config.json") for at in ("source", "disk"))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    per_layer = {"layer_types", "no_rope_layers", "max_window_layers"}
    assert changed <= {"num_hidden_layers", "n_layer"} | per_layer
    assert after.get("layer_types") == read_json(tmp_path / "memory" / "config.json").get(
        "layer_types"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_stay_as_they_are_stored(dtype, tmp_path):
    model = tiny_llama().to(dtype)
    model.save_pretrained(tmp_path / "source")
    sh.prune_checkpoint(tmp_path / "source", DROPPED, tmp_path / "cut")
    assert stock(tmp_path / "cut").dtype == dtype


def test_a_checkpoint_of_the_model_without_its_head(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "source")
    plan = sh.prune_checkpoint(tmp_path / "source", DROPPED, tmp_path / "cut")
    memory = sh.drop_layers(model, DROPPED)
    assert {name.split(".")[1] for name in stored(tmp_path / "cut") if name[:3] == "lay"} == set(
        "012"
    )
    assert torch.equal(logits_of(stock(tmp_path / "cut")), logits_of(model))
    assert plan.model.fingerprint == memory.model.fingerprint


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_quantised_checkpoints_of_bitsandbytes_stay_bit_by_bit(words, tmp_path, dtype):
    model_class, config_class, options = OTHERS["mistral"]
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    build(model_class, config_class, {**options, **sizes}).save_pretrained(tmp_path / "plain")
    words.save_pretrained(tmp_path / "plain")
    whole, tokenizer = sh.load_model(tmp_path / "plain", dtype=dtype)
    sh.save_model(whole, tokenizer, tmp_path / "source")
    model, tokenizer = sh.load_model(tmp_path / "source", dtype=dtype)
    plan = sh.drop_layers(model, DROPPED)
    sh.save_model(model, tokenizer, tmp_path / "memory")
    disk = tmp_path / "disk"
    done = sh.prune_checkpoint(tmp_path / "source", DROPPED, disk, "10KB", plan=plan)
    assert stored(disk) == stored(tmp_path / "memory")
    assert (done, done.model.dtype) == (plan, dtype)
    assert torch.equal(logits_of(stock(disk)), logits_of(stock(tmp_path / "memory")))


def test_fp8_of_transformers_stays_bit_by_bit(tmp_path, monkeypatch):
    model = plain_checkpoint("llama", tmp_path / "plain", hidden_size=64, intermediate_size=64)
    quantised = FineGrainedFP8Config(
        weight_block_size=(32, 32), modules_to_not_convert=["lm_head", "model.layers.2.mlp.up_proj"]
    )
    with monkeypatch.context() as patched:  # it asks for a GPU, and needs none to quantise
        patched.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
        whole = AutoModelForCausalLM.from_pretrained(model, quantization_config=quantised)
        whole.save_pretrained(tmp_path / "source")
    sh.prune_checkpoint(tmp_path / "source", DROPPED, tmp_path / "disk")
    assert {tensor.dtype for tensor in stored(tmp_path / "disk").values()} >= {"F8_E4M3", "F32"}
    config = read_json(tmp_path / "disk" / "config.json")["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.up_proj"]
    memory = stock(tmp_path / "source")
    sh.drop_layers(memory, DROPPED)
    assert torch.equal(logits_of(stock(tmp_path / "disk")), logits_of(memory))


def test_a_cut_can_be_cut_again(source, tmp_path):
    sh.prune_checkpoint(source, [1], tmp_path / "once", 1000)
    sh.prune_checkpoint(tmp_path / "once", [2, 3], tmp_path / "twice")
    sh.prune_checkpoint(source, DROPPED, tmp_path / "straight")
    assert stored(tmp_path / "twice") == stored(tmp_path / "straight")
    assert read_json(tmp_path / "twice" / "config.json") == read_json(
        tmp_path / "straight" / "config.json"
    )


# Families that the config alone describes.

DROPS = ([2, 3], [0, 1], [3, 4], [1], [1, 3, 4], [5])
PLAIN_SIZES = {**HEADS, "num_hidden_layers": 6, "sliding_window": 4}


def plain_checkpoint(family, folder, **options):
    torch.manual_seed(4)
    config = CONFIG_MAPPING[family](**{**PLAIN_SIZES, **options})
    model = AutoModelForCausalLM.from_config(config)
    for _, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def prepared(folder, drop):
    """What a cut writes, and how."""
    cut = checkpoint.prepare(folder, drop, 20_000)
    return cut.texts, cut.plan, cut.job.journal, cut.job.files, cut.carried


def assert_told_by_the_config(folder, monkeypatch, drops=DROPS[:3]):
    """Without a model built, every cut is the one with it."""
    assert checkpoint.plain_model(folder, read_json(folder / "config.json")) is not None
    for drop in drops:
        light = prepared(folder, drop)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "plain_model", lambda *_: None)
            assert light == prepared(folder, drop)
        assert light[1].model is not None


@pytest.mark.parametrize("family", VECTORS)
def test_the_config_alone_tells_the_cuts_of_plain_families(family, tmp_path, monkeypatch):
    folder = plain_checkpoint(family, tmp_path / "source")
    assert_told_by_the_config(folder, monkeypatch, DROPS)
    written = read_json(folder / "config.json")
    assert sh.prune_checkpoint(folder, DROPPED, tmp_path / "cut").dropped == tuple(DROPPED)
    assert len(stock(tmp_path / "cut").model.layers) == 3
    lists = ("layer_types", "no_rope_layers", "max_window_layers")
    old = {key: value for key, value in written.items() if key not in lists}
    if family != "smollm3":
        (folder / "config.json").write_text(json.dumps({**old, "_name_or_path": "a/b"}))
        assert_told_by_the_config(folder, monkeypatch)
    if set(lists) & set(written):
        kinds = WINDOWS["layer_types"]
        changed = {"layer_types": kinds, "max_window_layers": 3, "use_sliding_window": True}
        edit_json(folder / "config.json", **{**written, **changed})
        assert_told_by_the_config(folder, monkeypatch)


@pytest.mark.parametrize("family", VECTORS)
def test_so_it_does_in_four_bits(family, tmp_path, monkeypatch):
    plain = plain_checkpoint(
        family, tmp_path / "plain", hidden_size=64, intermediate_size=64, head_dim=16
    )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantisation("nf4"))
    model.save_pretrained(tmp_path / "source")
    assert_told_by_the_config(tmp_path / "source", monkeypatch)
    assert prepared(tmp_path / "source", [1])[1].model.dtype == "nf4"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_so_it_does_in_every_dtype(dtype, tmp_path, monkeypatch):
    model = tiny_llama().to(dtype)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(tmp_path / "source")
    assert_told_by_the_config(tmp_path / "source", monkeypatch)


@pytest.mark.parametrize("period", [1, 3])
def test_so_it_does_for_another_pattern_of_windows(period, tmp_path, monkeypatch):
    folder = plain_checkpoint("gemma3_text", tmp_path / "source")
    raw = read_json(folder / "config.json")
    del raw["layer_types"]
    (folder / "config.json").write_text(json.dumps({**raw, "sliding_window_pattern": period}))
    assert_told_by_the_config(folder, monkeypatch)


def test_keys_of_other_families_are_treated_alike(copied, tmp_path, monkeypatch):
    edit_json(
        copied / "config.json",
        per_layer=[0, 1, 2, 3, 4, 5],
        eos_token_id=[1, 2, 3, 4, 5, 6],
        max_window_layers=4,
        first_k_dense_replace=2,
        mlp_only_layers=[1, 5],
    )
    assert_told_by_the_config(copied, monkeypatch)
    edit_json(copied / "config.json", attn_layer_period=2, attn_layer_offset=0)
    assert_refused(ModelError, "attn_layer_period", copied, tmp_path / "cut", [1, 2, 3])


UNUSUAL = {
    "a bias": {"attention_bias": True},
    "own code": {"auto_map": {"AutoConfig": "a.B"}},
    "other family": {"model_type": "gpt2"},
    "no family": {"model_type": ["llama"]},
    "no count": {"num_hidden_layers": "6"},
    "no size": {"hidden_size": None},
    "another list": {"model_type": "qwen2", "layer_types": ["full_attention"] * 5},
    "another kind": {"model_type": "qwen2", "layer_types": ["full_attention"] * 5 + [["x"]]},
    "no list": {"model_type": "smollm3"},
    "a list of none of its own": {"layer_types": ["full_attention"] * 6},
    "a layer of its own": {"per_layer_config": {"2": {"intermediate_size": 8}}},
    "windows": {"model_type": "qwen2", "use_sliding_window": True},
    "another pattern": {"model_type": "gemma2", "sliding_window_pattern": 0},
}


@pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_built(source, changes):
    raw = {**read_json(source / "config.json"), **changes}
    assert checkpoint.plain_model(source, raw) is None


def test_a_family_that_is_built_is_cut_as_one_that_is_not(copied, tmp_path, monkeypatch):
    sh.prune_checkpoint(copied, DROPPED, tmp_path / "light")
    monkeypatch.setattr(checkpoint, "plain_model", lambda *_: None)
    sh.prune_checkpoint(copied, DROPPED, tmp_path / "built")
    assert tree(tmp_path / "light") == tree(tmp_path / "built")


FRESH = """
    import re, sys
    from pathlib import Path
    {}
    heavy = sorted({"torch", "transformers", "accelerate", "safetensors"} & set(sys.modules))
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(peak, *heavy, file=sys.stderr)
"""
WAYS = {
    "python": "import shallower; shallower.prune_checkpoint({source!r}, [1, 3], {out!r})",
    "command": """
    sys.argv = ["shallower", "prune", {source!r}, "--drop", "1,3", "--out", {out!r}, "--json"]
    from shallower.cli import main
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0""",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_family_is_cut_without_torch_and_in_little_memory(source, tmp_path, way):
    out = tmp_path / "cut"
    call = WAYS[way].format(source=str(source), out=str(out))
    code = textwrap.dedent(FRESH.replace("{}", call, 1))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, *heavy = done.stderr.split()
    assert heavy == []
    assert float(peak) < 128
    assert Plan.load(out / "shallower_plan.json").dropped == (1, 3)


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
    sh.prune_checkpoint(tmp_path / "source", DROPPED, tmp_path / "cut", 3000)
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
    sh.prune_checkpoint(source, DROPPED, tmp_path / "cut")
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
        {"config_groups": {"g": {"targets": [r"re:model\.layers\.5\.mlp.*"]}}},
    ],
)
def test_regexes_that_tell_layers_apart_are_refused(tmp_path, config):
    source = make_quantised(tmp_path / "source", "gptq", config)
    assert_refused(ModelError, "tells layers apart by number", source, tmp_path / "cut")
    sh.prune_checkpoint(source, [5], tmp_path / "cut")


def test_names_are_renumbered_where_they_name_the_decoders_layers():
    rename = Renumbering(
        ["model.language_model.layers", "language_model.model.layers"], [0, 2]
    ).rename
    for name, new in {
        "layers.2": "layers.1",
        "layers.1.x": None,
        "model.language_model.layers.2.mlp": "model.language_model.layers.1.mlp",
        "language_model.model.layers.2.layers.2": "language_model.model.layers.1.layers.2",
        "vision.layers.2.mlp": "vision.layers.2.mlp",
        "model.layers.*.mlp": "model.layers.*.mlp",
        "layers": "layers",
        "xlayers.1": "xlayers.1",
    }.items():
        assert rename(name) == new, name


# What lies beside the weights.


def test_the_config_is_edited_and_not_rewritten(copied, tmp_path):
    edit_json(
        copied / "config.json", custom={"of": ["mine", 1]}, per_layer=[0, 1, 2, 3, 4, 5], é="ü"
    )
    before = read_json(copied / "config.json")
    sh.prune_checkpoint(copied, DROPPED, tmp_path / "cut")
    after = read_json(tmp_path / "cut" / "config.json")
    assert list(after) == list(before)
    assert after == {**before, "num_hidden_layers": 3, "per_layer": [0, 2, 5]}


def test_a_config_is_edited_where_the_value_stands():
    before = {"n_layer": 6, "text": {"types": [1, 2], "same": 1}, "unset": None}
    after = {"n_layer": 3, "text": {"types": [2], "same": 1}, "unset": None, "new": 1}
    raw = {"num_layers": 6, "text": {"types": [1, 2], "own": 7}}
    edited = edit_config(raw, before, after, {"num_layers": "n_layer"})
    assert edited == {"num_layers": 3, "text": {"types": [2], "own": 7}, "new": 1}


def test_what_belongs_to_the_model_is_carried_over(copied, tmp_path):
    carried = ["chat_template.jinja", "LICENSE", "modeling_own.py", "tokenizer.model", "vocab.txt"]
    left = ["pytorch_model.bin", "model.gguf", "a.pth", "params.json", ".hidden", "b.safetensors"]
    left += ["model.fp16.safetensors.index.json", "pytorch_model.bin.index.json"]
    for name in carried + left:
        (copied / name).write_text(name)
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (copied / "original").mkdir()
    (copied / "original" / "params.txt").write_text("")
    (copied / "inside.txt").symlink_to("vocab.txt")
    (copied / "secret.txt").symlink_to("/etc/hostname")
    with pytest.warns(UserWarning, match=r"secret.txt is left out: .* outside of its folder"):
        sh.prune_checkpoint(copied, DROPPED, tmp_path / "cut")
    there = tree(tmp_path / "cut")
    expected = {"config.json", "generation_config.json", "model.safetensors", "shallower_plan.json"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "inside.txt", *carried, *EXPORT_FILES}
    assert set(there) == expected | {
        "additional_chat_templates",
        "additional_chat_templates/tool.jinja",
    }
    assert there["inside.txt"] == b"vocab.txt"
    for name in ("tokenizer.json", "generation_config.json"):
        assert there[name] == (copied / name).read_bytes()


def test_a_snapshot_of_the_hubs_cache_can_be_cut(source, tmp_path):
    repository = tmp_path / "models--a--tiny"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for position, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, repository / "blobs" / f"{position:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{position:040x}")
    sh.prune_checkpoint(snapshot, DROPPED, tmp_path / "cut")
    sh.prune_checkpoint(source, DROPPED, tmp_path / "straight")
    skip = {"shallower_plan.json", *EXPORT_FILES}  # they name the source
    seen, expected = tree(tmp_path / "cut"), tree(tmp_path / "straight")
    assert set(seen) == set(expected) > skip
    assert {n: c for n, c in seen.items() if n not in skip} == {
        n: c for n, c in expected.items() if n not in skip
    }


# Plans.


def test_a_plan_of_a_scan_is_carried_out(source, tmp_path):
    model, tokenizer = sh.load_model(source, dtype="float32")
    plan = sh.scan(model, tokenizer, ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]).plan(2)
    done = sh.prune_checkpoint(source, plan.blocks, tmp_path / "cut", plan=plan)
    assert done == plan == Plan.load(tmp_path / "cut" / "shallower_plan.json")


def test_a_plan_of_another_model_is_refused(source, tmp_path):
    other = tiny_llama(seed=1)
    torch.nn.init.uniform_(other.model.norm.weight)
    plan = sh.drop_layers(other, DROPPED)
    assert_refused(PlanError, "another model", source, tmp_path / "cut", plan=plan)
    plan = Plan(6, plan.blocks)
    assert_refused(PlanError, "asked for are", source, tmp_path / "cut", layers=[1], plan=plan)


@pytest.mark.parametrize("layers", [[], [6], [1, 1], range(6), ["1"], [-1]])
def test_layers_that_cannot_be_dropped_are_refused(source, tmp_path, layers):
    assert_refused(LayersError, "layer", source, tmp_path / "cut", layers=layers)


def test_a_cut_that_the_config_cannot_describe_is_refused(tmp_path):
    model = build(DiffLlamaForCausalLM, DiffLlamaConfig, GATED)
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "out").mkdir()
    words = "cannot describe this cut"
    assert_refused(ModelError, words, tmp_path / "source", tmp_path / "out" / "cut")


# Damaged and hostile checkpoints.


def header(path, change):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = change(raw[8 : 8 + length].decode())
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + length :])


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


def repoint(folder, place):
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["model.norm.weight"] = place
    edit_json(folder / "model.safetensors.index.json", **index)


def drop_tensor(folder, name):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys() if n != name}  # noqa: SIM118
        save_file(tensors, path, {"format": "pt"})
    index = read_json(folder / "model.safetensors.index.json")
    del index["weight_map"][name]
    edit_json(folder / "model.safetensors.index.json", **index)


def overlap(text):
    parsed = json.loads(text)
    names = [name for name in parsed if name != "__metadata__"]
    parsed[names[0]]["data_offsets"] = parsed[names[-1]]["data_offsets"]
    return json.dumps(parsed)


HARM = {
    "shard above": (lambda f: repoint(f, "../x.safetensors"), "expected the plain name"),
    "shard elsewhere": (lambda f: repoint(f, "/etc/x.safetensors"), "expected the plain name"),
    "no shard": (lambda f: repoint(f, "x.safetensors"), "x.safetensors"),
    "other shard": (lambda f: repoint(f, first_shard(f).name), "which lacks it"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "neither"),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "broken"),
    "huge header": (
        lambda f: first_shard(f).write_bytes(b"\xff" * 8 + first_shard(f).read_bytes()[8:]),
        "its header claims",
    ),
    "truncated": (lambda f: os.truncate(first_shard(f), 5000), "it holds|the file has"),
    "empty": (lambda f: os.truncate(first_shard(f), 0), "0 bytes"),
    "named twice": (
        lambda f: header(first_shard(f), lambda text: text.rstrip()[:-1] + "," + text.strip()[1:]),
        "duplicate|twice",
    ),
    "overlap": (lambda f: header(first_shard(f), overlap), "overlap|needs|bits"),
    "outer link": (
        lambda f: (first_shard(f).rename(f.parent / "x"), first_shard_link(f)),
        "outside of its folder|which lacks it|cannot read",
    ),
    "fifo": (lambda f: (first_shard(f).unlink(), os.mkfifo(f / SHARD)), "not a regular file"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "other weights": (
        lambda f: edit_json(f / "config.json", transformers_weights="x.safetensors"),
        "transformers_weights",
    ),
    "more layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=7),
        "lacks .*layers.6",
    ),
    "fewer layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=5), "also has .*5"),
    "absurdly many layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=10**12),
        "counts 1000000000000 layers",
    ),
    "lacks a tensor": (
        lambda f: drop_tensor(f, "model.layers.2.mlp.up_proj.weight"),
        "layer 2 lacks the tensor mlp.up_proj.weight",
    ),
}
SHARD = "model-00001-of-00012.safetensors"


def first_shard_link(folder):
    (folder / SHARD).symlink_to(folder.parent / "x")


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_or_hostile_checkpoint_is_refused(copied, tmp_path, harm):
    assert first_shard(copied).name == SHARD
    do, words = HARM[harm]
    do(copied)
    (tmp_path / "out").mkdir()
    assert_refused(ModelError, words, copied, tmp_path / "out" / "cut")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(ModelError, "none", tmp_path / "none", tmp_path / "cut")


def test_layers_are_found_by_the_names_of_tensors():
    def named(*prefixes, count=3):
        return [f"{prefix}.{i}.w" for prefix in prefixes for i in range(count)]

    path = "model.language_model.layers"
    for prefixes, found in [
        (["model.language_model.layers", "layers"], "model.language_model.layers."),
        (["layers", "vision.blocks"], "layers."),
        (["language_model.model.layers", "vision.blocks"], "language_model.model.layers."),
    ]:
        assert find_prefix(named(*prefixes), path, 3) == found
    with pytest.raises(ModelError, match=r"no tensors of the layers .*: a.layers., b.layers."):
        find_prefix(named("a.layers", "b.layers"), path, 3)
    with pytest.raises(ModelError, match="nothing"):
        find_prefix(["model.norm.weight"], path, 3)


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


# Whole or not at all.


def test_a_place_that_is_taken_is_refused(source, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "mine").write_text("mine")
    assert_refused(OutputError, "exists already", source, tmp_path / "cut")
    sh.prune_checkpoint(source, DROPPED, tmp_path / "cut", overwrite=True)
    assert not (tmp_path / "cut" / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_a_checkpoint_can_replace_itself(copied, source, tmp_path):
    sh.prune_checkpoint(copied, DROPPED, copied, overwrite=True)
    sh.prune_checkpoint(source, DROPPED, tmp_path / "cut")
    assert stored(copied) == stored(tmp_path / "cut")


@pytest.mark.parametrize(
    "size", [0, -1, "", "5 bananas", "0GB", "nan", True, "1e30GB", "99999999TB"]
)
def test_sizes_that_are_none_are_refused(source, tmp_path, size):
    assert_refused(OutputError, "size", source, tmp_path / "cut", max_shard_size=size)


def test_sizes_are_read():
    sizes = {"5GB": 5 * 10**9, "1.5 MB": 1_500_000, "2GiB": 2 << 30, "7": 7, 8: 8, "10k": 10_000}
    assert {text: checkpoint.parse_size(text) for text in sizes} == sizes


def test_a_full_disk_is_told_and_the_work_goes_on(source, tmp_path):
    out = tmp_path / "cut"
    with full_disk(12_000), pytest.raises(OutputError, match="do the same again to go on"):
        sh.prune_checkpoint(source, DROPPED, out, 10_000)
    assert not out.exists()
    assert partial_folder(out).is_dir()
    sh.prune_checkpoint(source, DROPPED, out, 10_000)
    sh.prune_checkpoint(source, DROPPED, tmp_path / "whole", 10_000)
    assert tree(out) == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_too_little_room_is_told_before_anything_is_copied(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 1000))
    assert_refused(OutputError, "1000 are free", source, tmp_path / "cut")


def test_a_place_that_cannot_be_written_to_is_told(source):
    with pytest.raises(OutputError, match="/proc/cut"):
        sh.prune_checkpoint(source, DROPPED, "/proc/cut")


def test_progress_is_told_and_can_stop_the_copy(source, tmp_path):
    heard = []

    def stop(done, total):
        heard.append((done, total))
        if len(heard) == 3:
            raise KeyboardInterrupt

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        sh.prune_checkpoint(source, DROPPED, out, 10_000, progress=stop)
    assert not out.exists()
    kept = {path.name: path.stat().st_ino for path in (partial_folder(out) / "folder").glob("m*")}
    heard.clear()
    sh.prune_checkpoint(source, DROPPED, out, 10_000, progress=lambda *args: heard.append(args))
    assert kept
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1][0] == heard[-1][1] == sum(len(t.content) for t in stored(out).values())


def test_other_threads_run_while_bytes_are_copied(source, tmp_path):
    job = checkpoint.prepare(source, DROPPED, 1000).job
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.perf_counter()
    job.write(tmp_path)
    ended = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(began < tick < ended for tick in ticks) >= 3


def test_work_of_another_job_is_discarded(source, tmp_path):
    out = tmp_path / "cut"

    def stop(done, total):
        if done > total / 2:
            raise InterruptedError

    with pytest.raises(OutputError):
        sh.prune_checkpoint(source, [0], out, 10_000, progress=stop)
    sh.prune_checkpoint(source, DROPPED, out, 9_000)
    sh.prune_checkpoint(source, DROPPED, tmp_path / "whole", 9_000)
    assert tree(out) == tree(tmp_path / "whole")


SERVER = """
    import os, sys, time
    from shallower.checkpoint import prune_checkpoint
    source, out = sys.argv[1:]
    def tell(done, total):
        os.write(1, b"copied\\n")
        time.sleep(0.001)
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            os.write(1, b"%d\\n" % os.getpid())
            prune_checkpoint(source, [1, 3, 4], out, 4000, progress=tell)
            os._exit(0)
        os.waitpid(child, 0)
        os.write(1, b"ended\\n")
"""


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_and_nothing_is_half_there(source, tmp_path, seed):
    chance = random.Random(seed)
    out, whole = tmp_path / "cut", tmp_path / "whole"
    sh.prune_checkpoint(source, DROPPED, whole, 4000)
    command = [sys.executable, "-c", textwrap.dedent(SERVER), source, out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        for attempt in range(200):
            server.stdin.write("go\n")
            server.stdin.flush()
            child, copied = int(server.stdout.readline()), 0
            patience = attempt + chance.randrange(5)
            while server.stdout.readline() != "ended\n":
                copied += 1
                if copied == patience:
                    time.sleep(chance.random() * 0.004)
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                        kills += 1
            if out.exists():
                break
        server.stdin.close()
    assert kills >= 5
    assert tree(out) == tree(whole)


def test_one_process_at_a_time(source, tmp_path):
    out = tmp_path / "cut"

    def nested(done, total):
        with pytest.raises(OutputError, match="another process is writing it"):
            sh.prune_checkpoint(source, DROPPED, out)

    sh.prune_checkpoint(source, DROPPED, out, progress=nested)


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
    sh.prune_checkpoint(whole, [2, 3], out)
    cut = load_file(out / "model.safetensors")
    for name, value in extra.items():
        assert torch.equal(cut[name.replace(".8.", ".6.", 1)], value)
    assert not any(name.startswith(("model.layers.7.", "model.layers.8.")) for name in cut)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (6, 1)


def _rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
