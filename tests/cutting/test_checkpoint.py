"""Cuts on disk against cuts in memory."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
)

import shallower as sh
from shallower import ModelError, Plan
from shallower.cutting import checkpoint
from shallower.cutting.exports import EXPORT_FILES
from shallower.cutting.plain import VECTORS
from shallower.models.quantised import quantisation
from shallower.storage import RECORD
from tests.conftest import mostly_slow, tiny_llama
from tests.cutting.checkpoints import DROPPED, assert_refused, edit_json, read_json, stored
from tests.cutting.mixtures import mixture, some_experts
from tests.cutting.tiny_models import HEADS, WINDOWS, logits_of, reload
from tests.families import MIXTURES, random_model
from tests.folders import tree


# The same cut as in memory.
@pytest.mark.parametrize("size", ["5GB", "30KB", 1])
def test_a_cut_on_disk_is_the_cut_in_memory(source, tmp_path, size):
    model, tokenizer = sh.load_model(source, dtype="float32")
    plan = sh.drop_layers(model, DROPPED)
    sh.save_model(model, tokenizer, tmp_path / "memory", plan=plan)
    assert sh.prune(source, DROPPED, tmp_path / "disk", max_shard_size=size) == plan
    disk = tmp_path / "disk"
    assert stored(disk) == stored(tmp_path / "memory")
    assert Plan.load(disk / "shallower_plan.json") == plan
    assert torch.equal(logits_of(reload(disk)), logits_of(model))
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


FAMILIES = (
    "gemma3_text", "gpt_oss, two kinds", "gpt2", "qwen2_moe", "qwen2", "qwen3", "gemma2, two kinds",
    "smollm3, some without RoPE", "mistral, windowed", "opt", "phi", "bloom", "falcon",
)  # fmt: skip


CUTS = [
    *((family, "layers") for family in FAMILIES),
    *((family, "experts") for family in sorted(MIXTURES)),
    *((family, "both") for family in ("gpt_oss", "mixtral", "qwen2_moe")),
]
BY_DAY = ("gemma3_text", "gpt_oss, two kinds", "gpt2", "qwen2_moe")
QUICK = [*((family, "layers") for family in BY_DAY), ("gpt_oss", "both")]
QUICK += [(family, "experts") for family in ("gpt_oss", "mixtral", "granitemoe")]


@pytest.mark.parametrize(("family", "what"), mostly_slow(CUTS, QUICK))
def test_families_are_cut_on_disk_as_in_memory(family, what, tmp_path):
    model = random_model(family) if what == "layers" else mixture(family)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    dropped = {"layers": [0, 2, 5], "experts": [], "both": [3, 4]}[what]
    experts = None
    if what != "layers":
        experts = {k: some for k, some in some_experts(model).items() if k not in dropped}
    plan = sh.prune(tmp_path / "source", dropped, tmp_path / "disk", experts=experts)
    assert sh.prune(tmp_path / "source", tmp_path / "disk", tmp_path / "again") == plan
    memory = sh.drop_layers(model, plan)
    model.save_pretrained(tmp_path / "memory")
    assert stored(tmp_path / "disk") == stored(tmp_path / "again") == stored(tmp_path / "memory")
    found = logits_of(reload(tmp_path / "disk"))
    torch.testing.assert_close(found, logits_of(model), rtol=0, atol=1e-5)
    assert plan.model.fingerprint == memory.model.fingerprint
    before, after, saved = (config_in(tmp_path / at) for at in ("source", "disk", "memory"))
    assert [*before] == [*after]
    assert after == {key: saved.get(key) for key in after}


def config_in(folder):
    own = ("transformers_version", "_name_or_path")
    return {k: v for k, v in read_json(folder / "config.json").items() if k not in own}


@pytest.mark.parametrize("dtype", mostly_slow(["nf4", "int8"], ["nf4"]))
def test_quantised_checkpoints_of_bitsandbytes_stay_bit_by_bit(words, tmp_path, dtype):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    plain_checkpoint("mistral", tmp_path / "plain", **sizes)
    words.save_pretrained(tmp_path / "plain")
    whole, tokenizer = sh.load_model(tmp_path / "plain", dtype=dtype)
    sh.save_model(whole, tokenizer, tmp_path / "source")
    model, tokenizer = sh.load_model(tmp_path / "source", dtype=dtype)
    plan = sh.drop_layers(model, DROPPED)
    sh.save_model(model, tokenizer, tmp_path / "memory")
    disk = tmp_path / "disk"
    done = sh.prune(tmp_path / "source", plan, disk, max_shard_size="10KB")
    assert stored(disk) == stored(tmp_path / "memory")
    assert (done, done.model.dtype) == (plan, dtype)
    assert torch.equal(logits_of(reload(disk)), logits_of(reload(tmp_path / "memory")))


# Families that the config alone describes.
DROPS = ([0, 1], [3, 4], [1], [1, 3, 4], [5])
DIFFERENT = ("llama", "mixtral")
"""Plain families that differ most."""
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
    cut = checkpoint.prepare(folder, drop, max_shard_size=20_000)
    return cut.texts, cut.plan, cut.job.journal, cut.job.files, cut.carried


def assert_told_by_the_config(folder, monkeypatch, drops=DROPS[:2]):
    """Without a model built, every cut is the one with it."""
    assert checkpoint.plain_model(folder, read_json(folder / "config.json")) is not None
    for drop in drops:
        light = prepared(folder, drop)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "plain_model", lambda *_: None)
            assert light == prepared(folder, drop)
        assert light[1].model is not None


@pytest.mark.parametrize("family", mostly_slow(VECTORS, quick=DIFFERENT))
def test_the_config_alone_tells_the_cuts_of_plain_families(family, tmp_path, monkeypatch):
    folder = plain_checkpoint(family, tmp_path / "source")
    assert_told_by_the_config(folder, monkeypatch, DROPS)
    written = read_json(folder / "config.json")
    assert sh.prune(folder, DROPPED, tmp_path / "cut").dropped == tuple(DROPPED)
    assert len(reload(tmp_path / "cut").model.layers) == 3
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


@pytest.mark.parametrize("family", mostly_slow(VECTORS, quick=DIFFERENT))
def test_so_it_does_in_four_bits(family, tmp_path, monkeypatch):
    plain = plain_checkpoint(
        family, tmp_path / "plain", hidden_size=64, intermediate_size=64, head_dim=16
    )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantisation("nf4"))
    model.save_pretrained(tmp_path / "source")
    assert_told_by_the_config(tmp_path / "source", monkeypatch, [DROPPED])
    assert prepared(tmp_path / "source", [1])[1].model.dtype == "nf4"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_so_it_does_in_every_dtype(dtype, tmp_path, monkeypatch):
    model = tiny_llama().to(dtype)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(tmp_path / "source")
    assert_told_by_the_config(tmp_path / "source", monkeypatch, [DROPPED])


@pytest.mark.parametrize("period", mostly_slow([1, 3], [3]))
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


FRESH = """
    import re, sys
    from pathlib import Path
    {}
    slow = {"torch", "transformers", "accelerate", "safetensors", "rich.console"}
    heavy = sorted(slow & set(sys.modules))
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(peak, *heavy, file=sys.stderr)
"""
WAYS = {
    "python": "import shallower; shallower.prune({source!r}, [1, 3], {out!r})",
    "command": """
    sys.argv = ["shallower", "prune", {source!r}, "--drop", "1,3", "--out", {out!r}, "--json"]
    from shallower.cli import main
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0""",
}


@pytest.mark.parametrize("way", mostly_slow(WAYS, ["command"]))
def test_a_plain_family_is_cut_without_torch_and_in_little_memory(source, tmp_path, way):
    out = tmp_path / "cut"
    call = WAYS[way].format(source=str(source), out=str(out))
    code = textwrap.dedent(FRESH.replace("{}", call, 1))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, *heavy = done.stderr.splitlines()[-1].split()
    assert heavy == []
    assert float(peak) < 128
    assert Plan.load(out / "shallower_plan.json").dropped == (1, 3)


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
        sh.prune(copied, DROPPED, tmp_path / "cut")
    there = tree(tmp_path / "cut")
    expected = {"config.json", "generation_config.json", "model.safetensors", "shallower_plan.json"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "inside.txt", RECORD, *carried}
    expected |= {*EXPORT_FILES}
    assert set(there) == expected | {
        "additional_chat_templates",
        "additional_chat_templates/tool.jinja",
    }
    assert there["inside.txt"] == b"vocab.txt"
    for name in ("tokenizer.json", "generation_config.json"):
        assert there[name] == (copied / name).read_bytes()


# Plans.
def test_names_that_are_no_unicode_are_those_of_a_model_too(copied, tmp_path):
    edit_json(copied / "config.json", note="\ud800")
    source, out = (tmp_path / os.fsdecode(name) for name in (b"mod\xe9le", b"coup\xe9"))
    copied.rename(source)
    sh.prune(source, DROPPED, out)
    assert read_json(out / "config.json")["note"] == "\ud800"
    assert "# mod?le without" in (out / "README.md").read_text(encoding="utf-8")


def test_a_cut_that_the_config_cannot_describe_is_refused(tmp_path):
    model = random_model("diffllama")
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "out").mkdir()
    words = "cannot describe this cut"
    assert_refused(ModelError, words, tmp_path / "source", tmp_path / "out" / "cut")
