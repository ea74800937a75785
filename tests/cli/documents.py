"""Texts for the command line."""

import random
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import WORDS


def documents(count, seed=0):
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(3, 20))) for _ in range(count)]


def tree(folder):
    """Everything below a folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# Help.
def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# Pruning.
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
