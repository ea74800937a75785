"""A tiny embedder of sentence-transformers: a decoder, the state of its last token, unit length.

Its files are those of Qwen3-Embedding, whose tensors have no prefix either.
"""

import json

from tests.conftest import TINY

MODULES = "config_sentence_transformers.json", "modules.json", "1_Pooling/config.json"
"""The files by which sentence-transformers makes an embedder of the decoder."""

_PLACES = "sentence_transformers.models"


def write(folder, tokenizer, num_layers=6):
    """A folder with a random Qwen3 without a head of its own, and with the modules behind it."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    config = Qwen3Config(
        **TINY,
        num_hidden_layers=num_layers,
        head_dim=8,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_PLACES}.{kind}"}
        for number, (path, kind) in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": 32, "pooling_mode_lasttoken": True}
    settings = {"prompts": {"query": "w1 w2 "}, "similarity_fn_name": "cosine"}
    (folder / "1_Pooling").mkdir()
    for name, value in zip(MODULES, (settings, modules, pooling), strict=True):
        (folder / name).write_text(json.dumps(value))
    return folder
