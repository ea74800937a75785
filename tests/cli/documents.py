"""Cuts on disk."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def assert_cut(path, model, survivors):
    """``path`` holds the layers ``survivors`` of the checkpoint ``model``, bit for bit."""
    cut, whole = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.bfloat16) for each in (path, model)
    )
    assert cut.config.num_hidden_layers == len(cut.model.layers) == len(survivors)
    for layer, index in zip(cut.model.layers, survivors, strict=True):
        original = whole.model.layers[index].state_dict()
        assert all(torch.equal(layer.state_dict()[name], original[name]) for name in original)
    assert torch.equal(cut.lm_head.weight, whole.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("w1 w2")["input_ids"] == [1, 2]
