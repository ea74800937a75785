"""Models of more than text that have no causal class: their decoder is cut, all else stays."""

import json

import pytest
import torch
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

import shallower as sh
from shallower.cutting.tensor_names import find_prefix
from shallower.models.architecture import find_layers
from tests.commands import in_this_process
from tests.conftest import mostly_slow, write_jsonl
from tests.cutting.test_families import logits, passing_on
from tests.cutting.test_laid_over import changed, tensors_in
from tests.documents import documents
from tests.families import IS_OLDER, WHOLE, WHOLE_REFUSED, small_weights, with_towers


def store_whole(name, words, folder, head_scale=1):
    """Write a small random model of a type with its tokenizer, its head scaled."""
    torch.manual_seed(0)
    made = small_weights(AutoModelForMultimodalLM.from_config(with_towers(name))).bfloat16()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(head_scale)
    made.save_pretrained(folder)
    words.save_pretrained(folder)


@pytest.mark.parametrize("name", mostly_slow(WHOLE, ["kimi_k25", "mistral3", "qwen3_vl"]))
def test_the_decoder_of_a_whole_model_is_cut(name, words, tmp_path):
    store_whole(name, words, tmp_path / "whole")
    sh.prune(tmp_path / "whole", [4], tmp_path / "cut")
    cut, read = AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "cut", dtype=torch.float32, output_loading_info=True
    )
    assert not any(read.values())
    model, tokenizer = sh.load_model(tmp_path / "whole", "float32")
    tokens = torch.arange(7, 27).view(2, 10)
    hook = find_layers(model).modules[4].register_forward_hook(passing_on, with_kwargs=True)
    torch.testing.assert_close(logits(cut, tokens), logits(model, tokens), rtol=0, atol=1e-5)
    hook.remove()
    plan = sh.drop_layers(model, [4])
    changed(model)
    sh.save_model(model, tokenizer, tmp_path / "saved", plan=plan)
    before, after = tensors_in(tmp_path / "cut"), tensors_in(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert "AutoModelForMultimodalLM.from_pretrained" in (tmp_path / "cut/README.md").read_text()
    assert sum(not torch.equal(before[key], after[key]) for key in before) == 2


REPAIRED = sorted(
    {*WHOLE}
    - {
        *("exaone4_5", "glm46v", "glm4v", "glm_ocr", "glmga", "hyperclovax_vision_v2"),
        *("cosmos3_omni", "idefics2", "inkling_mm_model", "lfm3_vl", "minicpmv4_6"),
        *("minicpmv4_7", "mistral4", "mistral_large4", "muse_glimmer", "qwen2_5_omni_thinker"),
        *("qwen2_vl", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "step3p7"),
        "unlimited_ocr",
    }
)
"""Without those whose random model is refused a patch (experts before the block, no gain), or not
healed."""


@pytest.mark.parametrize("name", mostly_slow(REPAIRED, ["mistral3"]))
def test_a_patch_and_a_healing_keep_the_tower(name, words, tmp_path):
    """What is not of the decoder's layers is equal to the byte."""
    store_whole(name, words, tmp_path / "whole", head_scale=20)  # so that a patch helps
    (tmp_path / "whole/preprocessor_config.json").write_text('{"size": 14}')
    sh.prune(tmp_path / "whole", [4], tmp_path / "cut")
    model, tokenizer = sh.load_model(tmp_path / "whole", "float32")
    done = sh.patch(model, tokenizer, [4], texts=[*documents(400)], max_length=32)
    sh.save_patched(model, tokenizer, tmp_path / "patched", done=done)
    texts = write_jsonl(tmp_path / "texts.jsonl", documents(60)[:40])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", documents(60)[40:])
    data = ("--texts", texts, "--eval-texts", held_out, "--out", tmp_path / "healed")
    how = ("--dtype", "float32", "--max-length", 16, "--steps", 2, "--rank", 2, "--merge")
    done = in_this_process("heal", tmp_path / "cut", *data, *how, "--learning-rate", 0.01)
    assert done.status == 0, done.err
    cut = tensors_in(tmp_path / "cut")
    layers = find_layers(model)
    stored = find_prefix(cut, layers.path, len(layers))
    for way in ("patched", "healed"):
        found = tensors_in(tmp_path / way)
        assert [(n, t.dtype, t.shape) for n, t in found.items()] == [
            (n, t.dtype, t.shape) for n, t in cut.items()
        ]
        other = {key for key, value in cut.items() if not torch.equal(value, found[key])}
        assert other
        assert all(key.startswith(stored) for key in other), (way, other)
        assert (tmp_path / way / "preprocessor_config.json").read_text() == '{"size": 14}'
        loading = {"dtype": torch.float32, "output_loading_info": True}
        _, read = AutoModelForMultimodalLM.from_pretrained(tmp_path / way, **loading)
        assert not any(read.values())
        configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("cut", way)]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("name", mostly_slow(sorted(WHOLE_REFUSED), ["blip", "idefics"]))
def test_what_cannot_be_cut_is_refused_in_a_sentence(name):
    model = small_weights(AutoModelForMultimodalLM.from_config(with_towers(name)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(sh.ModelError, match=WHOLE_REFUSED[name]):
        sh.drop_layers(model, [4])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.skipif(IS_OLDER, reason="the lists are of a newer transformers")
def test_the_lists_name_types_that_transformers_has_and_none_twice():
    named = [*WHOLE, *WHOLE_REFUSED]
    assert len({*named}) == len(named)
    assert {*named} <= MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys()
    assert not {*named} & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


def test_layers_that_images_are_added_to_stay():
    model = AutoModelForMultimodalLM.from_config(with_towers("qwen3_vl"))
    with pytest.raises(sh.ModelError, match="layer 1 takes features of images"):
        sh.drop_layers(model, [1])


def test_text_alone_needs_a_class_of_its_own(tmp_path):
    model = AutoModelForMultimodalLM.from_config(with_towers("llava"))
    for plan in (None, sh.drop_layers(model, [1])):
        with pytest.raises(sh.ModelError, match="no class of its own"):
            sh.save_model(model, None, tmp_path / "cut", plan=plan, text_only=True)
