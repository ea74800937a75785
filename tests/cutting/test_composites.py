"""Models of more than text, of which a stock loader builds the text part alone, cut on disk."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import shallower as sh
from tests.conftest import mostly_slow
from tests.cutting.test_families import logits

TEXT = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 14}
MODELS = {
    "llama4": {
        "text_config": {
            **TEXT, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
        "vision_config": {
            **VISION, "num_hidden_layers": 2, "num_attention_heads": 4, "vision_output_dim": 32,
            "projector_input_dim": 32, "projector_output_dim": 32, "image_size": 28,
        },
        "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5,
    },
    "qwen3_5_moe": {
        "text_config": {
            **TEXT, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
            "num_experts": 6, "num_experts_per_tok": 2, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        "vision_config": {
            **VISION, "depth": 2, "out_hidden_size": 32, "num_position_embeddings": 16
        },
        "image_token_id": 5, "video_token_id": 6,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(MODELS, ["llama4"]))
def test_the_text_part_is_cut_and_all_else_stays(name, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **MODELS[name])
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    experts = {layer: [1] for layer in (0, 2, 3)}
    sh.prune(tmp_path / "whole", [1], tmp_path / "cut", experts=experts)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    sh.drop_layers(model, sh.Plan.load(tmp_path / "cut" / "shallower_plan.json"))
    tokens = torch.randint(7, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert torch.equal(logits(found, tokens), logits(model, tokens))
    whole, (cut, read) = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / folder, output_loading_info=read)
        for folder, read in (("whole", False), ("cut", True))
    )
    assert not any(read.values())
    before, after = (
        {
            key: value
            for key, value in one.state_dict().items()
            if not re.search(r"language_model\.(model\.)?layers\.", key)
        }
        for one in (whole, cut)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert cut.config.vision_config.to_dict() == whole.config.vision_config.to_dict()


def test_what_is_loaded_is_saved_without_the_rest_and_says_so(words, tmp_path):
    config = AutoConfig.for_model("qwen3_5_moe", **MODELS["qwen3_5_moe"])
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    words.save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match="gets the text part of .*whole alone.* to keep the rest"):
        sh.prune(tmp_path / "whole", [1], tmp_path / "cut", dtype="bfloat16")
