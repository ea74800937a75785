"""Models of more than text, of which a stock loader builds the text part alone, cut on disk."""

import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import shallower as sh
from shallower.models.source import ModelSource
from shallower.models.unsaved import unsaved
from tests.conftest import mostly_slow, write_jsonl
from tests.cutting.test_families import logits
from tests.documents import documents
from tests.families import with_towers


@pytest.mark.parametrize("name", mostly_slow(["llama4", "qwen3_5_moe"], ["llama4"]))
def test_the_text_part_is_cut_and_all_else_stays(name, tmp_path):
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(with_towers(name)).save_pretrained(tmp_path / "whole")
    experts = {layer: [1] for layer in ((3, 5, 7) if name == "llama4" else (0, *range(2, 8)))}
    sh.prune(tmp_path / "whole", [1], tmp_path / "cut", experts=experts)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    sh.drop_layers(model, sh.Plan.load(tmp_path / "cut" / "shallower_plan.json"))
    tokens = torch.randint(7, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert torch.equal(logits(found, tokens), logits(model, tokens))
    (whole, _), (cut, read) = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / folder, output_loading_info=True)
        for folder in ("whole", "cut")
    )
    assert not any(read.values())
    inside = re.compile(r"language_model\.(model\.)?layers\.").search
    before, after = (
        {key: value for key, value in one.state_dict().items() if not inside(key)}
        for one in (whole, cut)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert cut.config.vision_config.to_dict() == whole.config.vision_config.to_dict()


@pytest.fixture(scope="module")
def towers(words, tmp_path_factory):
    """A model with a tower, heads for more tokens, buffers of old checkpoints, in several files."""
    folder = tmp_path_factory.mktemp("towers") / "whole"
    AutoModelForImageTextToText.from_config(with_towers("qwen3_5_moe")).save_pretrained(folder)
    words.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    inside = "model.language_model.layers.3.self_attn"
    tensors |= {
        "mtp.fc.weight": torch.zeros(4, 4),
        "mtp.layers.0.mlp.up_proj.weight": torch.zeros(8, 8),
        f"{inside}.rotary_emb.inv_freq": torch.zeros(4),
        f"{inside}.q_proj.weight_scale": torch.zeros(4),
        "lm_head.weight_scale": torch.zeros(4),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"other.weight": torch.zeros(4)}, folder / "consolidated.safetensors")
    return folder


def test_what_a_loaded_model_is_without_is_counted_by_prefix(towers, tmp_path):
    tower = {
        name: tensor.nbytes
        for name, tensor in load_file(towers / "model.safetensors").items()
        if name.startswith("model.visual.")
    }
    expected = {"model.visual": (len(tower), sum(tower.values())), "mtp": (2, 4 * 16 + 4 * 64)}
    source = ModelSource(towers)
    assert unsaved(source) == expected
    model = AutoModelForCausalLM.from_pretrained(towers)
    sh.drop_layers(model, [1])
    assert unsaved(model) == expected  # and not the layers that were dropped
    with_images = AutoModelForImageTextToText.from_pretrained(towers)
    assert [*unsaved(with_images)] == ["mtp"]
    with pytest.warns(
        UserWarning, match=r"without model.visual .*, mtp \(2 tensors, .* keeps"
    ) as said:
        sh.save_model(model, None, tmp_path / "cut")
    assert len(said) == 1
    with warnings.catch_warnings():  # it is said once, and not of what has lost them already
        warnings.simplefilter("error")
        sh.save_model(model, None, tmp_path / "again")
        sh.save_model(AutoModelForCausalLM.from_pretrained(tmp_path / "cut"), None, tmp_path / "c")


@pytest.mark.parametrize("command", ["patch", "run"])
def test_what_would_be_lost_is_refused(towers, words, shallower, tmp_path, command):
    """A weight that is stored in another shape lets nothing be laid over the source."""
    folder = shutil.copytree(towers, tmp_path / "odd")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    texts = write_jsonl(tmp_path / "texts.jsonl", documents(32))
    args = (command, folder, "--texts", texts, "--max-length", 16, "--out", "out")
    args += ("--drop", 1) if command == "patch" else ("--n", 1)
    planned = shallower(*args, "--dry-run", "--json").json["not_saved"]
    assert {one: found["tensors"] for one, found in planned.items()} == {
        "model.visual": 33, "mtp": 2
    }  # fmt: skip
    done = shallower(*args)
    assert done.status
    assert re.search(r"without model.visual \(33 tensors, .* MB\), mtp \(2 tensors", done.err)
    assert not (tmp_path / "out").exists()
    kept = shallower(command, towers, *args[2:], "--dry-run", "--json").json
    assert not kept.get("not_saved")
