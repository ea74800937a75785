"""A cut in memory is saved as its source stores it, with what changed laid over."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import shallower as sh
from shallower.models.architecture import find_layers
from shallower.models.offload import stored_weight, write_weight
from tests.conftest import mostly_slow
from tests.cutting.test_families import logits
from tests.documents import documents
from tests.families import families, random_model, with_towers

MTP = {"mtp.fc.weight": torch.arange(16.0).view(4, 4), "mtp.norm.weight": torch.ones(4)}


@pytest.fixture(scope="module", params=["llama4", "qwen3_5", "qwen3_5_moe"])
def whole(request, words, tmp_path_factory):
    """A checkpoint with a tower, heads for more tokens, a processor and two files of weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole") / request.param
    model = AutoModelForImageTextToText.from_config(with_towers(request.param)).bfloat16()
    with torch.no_grad():  # so that a layer changes what is predicted
        model.get_output_embeddings().weight.mul_(20)
        for layer in find_layers(model).modules:
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.mul_(5)
    model.save_pretrained(folder, max_shard_size="150KB")
    words.save_pretrained(folder)
    save_file(MTP, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(MTP, "model-mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "preprocessor_config.json").write_text('{"size": 14}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def tensors_in(folder):
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@torch.no_grad()
def changed(model):
    """Move one matrix of each of two layers of a model, which may be streamed; their names."""
    layers = find_layers(model).modules
    for layer in (layers[0], layers[2]):
        inner = next(m for n, m in layer.named_modules() if n.endswith(("o_proj", "out_proj")))
        write_weight(inner, "weight", stored_weight(inner, "weight") + 1 / 3)


@pytest.mark.parametrize(
    ("dtype", "device_map"), [("bfloat16", None), ("float32", None), ("bfloat16", "stream")]
)
def test_only_what_changed_differs_from_the_cut_on_disk(whole, tmp_path, dtype, device_map):
    sh.prune(whole, [1], tmp_path / "cut")
    model, tokenizer = sh.load_model(whole, dtype, device_map)
    plan = sh.drop_layers(model, [1])
    changed(model)
    sh.save_model(model, tokenizer, tmp_path / "saved", plan=plan)
    cut, saved = tensors_in(tmp_path / "cut"), tensors_in(tmp_path / "saved")
    assert [(n, t.dtype, t.shape) for n, t in cut.items()] == [
        (n, t.dtype, t.shape) for n, t in saved.items()
    ]
    other = [name for name, tensor in cut.items() if not torch.equal(tensor, saved[name])]
    assert len(other) == 2, other
    assert all(".layers.0." in name or ".layers.2." in name for name in other), other
    for name in other:
        assert torch.equal(saved[name], (cut[name].to(model.dtype) + 1 / 3).bfloat16())
    written = {path.name for path in (tmp_path / "saved").iterdir()}
    assert written == {path.name for path in (tmp_path / "cut").iterdir()}
    for name in written - {"README.md", "shallower_plan.json", ".shallower.json"}:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "saved" / name).read_bytes() == (
                tmp_path / "cut" / name
            ).read_bytes()
    _, read = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not read["missing_keys"]
    assert set(read["unexpected_keys"]) <= MTP.keys()


@pytest.mark.parametrize("whole", ["llama4", "qwen3_5"], indirect=True)
def test_a_patch_keeps_the_tower(whole, words, tmp_path):
    model, _ = sh.load_model(whole, "float32")
    done = sh.patch(model, words, [1], texts=[*documents(400)], max_length=32)
    sh.save_patched(model, words, tmp_path / "patched", done=done)
    assert sh.verify_checkpoint(model, words, tmp_path / "patched", layers=None) == 0
    before, after = tensors_in(whole), tensors_in(tmp_path / "patched")
    tower = [name for name in before if "vision" in name or "visual" in name or name in MTP]
    assert len(tower) > 10
    assert all(torch.equal(before[name], after[name]) for name in tower)
    assert {tensor.dtype for name, tensor in after.items() if name not in MTP} == {torch.bfloat16}


def test_a_model_that_is_another_one_now_is_saved_as_it_is(words, tmp_path):
    random_model("llama").save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.resize_token_embeddings(140)
    plan = sh.drop_layers(model, [1])
    sh.save_model(model, None, tmp_path / "cut", plan=plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert again.config.vocab_size == 140
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("way", ["prune", "save_model"])
def test_text_only_saves_the_causal_class_alone(whole, tmp_path, way):
    model, tokenizer = sh.load_model(whole, "bfloat16")
    plan = sh.drop_layers(model, [1])
    if way == "prune":
        sh.prune(whole, [1], tmp_path / "text", text_only=True)
    else:
        sh.save_model(model, tokenizer, tmp_path / "text", plan=plan, text_only=True)
    loaded, read = AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not read["missing_keys"]
    assert not read["unexpected_keys"]
    tokens = torch.arange(7, 27).view(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    kept = tensors_in(tmp_path / "text")
    assert not [name for name in kept if "vision" in name or "visual" in name or name in MTP]
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert "vision_config" not in config
    assert "text_only=True" in (tmp_path / "text" / "README.md").read_text() or (
        "--text-only" in (tmp_path / "text" / "README.md").read_text()
    )


NOT_OPENED = {"emu3", "mllama"}
"""Families whose text part no stock loader opens by its saved config."""


@pytest.mark.parametrize(
    "name", mostly_slow(families(), ["dots3_note_text", "gpt2", "llama", "qwen3_moe"])
)
def test_every_family_is_saved_as_it_is_in_memory(name, tmp_path):
    if name in NOT_OPENED:
        pytest.skip("no stock loader opens it")
    random_model(name).save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    plan = first_cut(model)
    with torch.no_grad():
        for weight in find_layers(model).modules.parameters():
            weight.mul_(1.01)
    sh.save_model(model, None, tmp_path / "cut", plan=plan)
    found, read = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(read.values())
    after = found.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
    tokens = torch.arange(5, 25).view(2, 10)
    torch.testing.assert_close(
        logits(found.eval(), tokens), logits(model, tokens), rtol=0, atol=1e-5
    )


def first_cut(model):
    for layers in ([3, 4], [4], [5, 6], [6], [0, 1], [1, 2, 5, 6], [2, 3, 6, 7]):
        try:
            return sh.drop_layers(model, layers)
        except sh.ModelError:
            continue
    pytest.skip("these layers stay")
