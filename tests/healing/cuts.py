"""Cut models to heal, a recipe that takes seconds, and healings that are killed."""

import random

import pytest

import shallower as sh
from shallower.healing import folders
from shallower.settings.recipe import ModelFacts, Recipe
from tests.conftest import WORDS

BLOCK = sh.Block(2, 4)
QUICK = Recipe(
    steps=6, rank=4, learning_rate=1e-2, max_length=16, dtype="float32", eval_every=2, batch_size=8,
    packing=True, attention=False, dropout=0.05,
)  # fmt: skip
FACTS = ModelFacts("llama", 576, 30, 2048)


def documents(count, seed):
    """Arithmetic progressions of words: something that can be learned."""
    source = random.Random(seed)
    starts = [(source.randrange(97), source.randint(1, 2)) for _ in range(count)]
    return [
        " ".join(WORDS[(start + k * step) % 97] for k in range(source.randint(3, 30)))
        for start, step in starts
    ]


TEXTS, HELD_OUT = documents(120, 0), documents(12, 1)
MANY = 128
"""Documents that a patch and a quick healing find enough in."""


def save_cut(path, model, tokenizer, layers=(BLOCK,)):
    whole, cut = path / "whole", path / "cut"
    sh.save_model(model, tokenizer, whole)
    (whole / "LICENSE").write_text("Do as you like.")
    loaded, _ = sh.load_model(whole, dtype=str(model.dtype).removeprefix("torch."))
    plan = sh.drop_layers(loaded, layers)
    sh.save_model(loaded, tokenizer, cut, plan=plan)
    return whole, cut


def kill_after_two_steps(monkeypatch, cut, out, **options):
    """Heal a cut on texts, killed when its second step is kept."""

    def interrupted(checkpoint):
        mark(checkpoint)
        if checkpoint.name == "checkpoint-2":
            raise KeyboardInterrupt

    mark = folders.mark_complete
    with monkeypatch.context() as patched:
        patched.setattr(folders, "mark_complete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sh.heal(cut, TEXTS, out, **options)
