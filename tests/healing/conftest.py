"""Cut and healed models."""

import shutil

import pytest

import shallower as sh
from shallower.runs import demo
from tests.conftest import tiny_llama
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS, save_cut


@pytest.fixture(scope="session")
def both(tmp_path_factory, words):
    """The folders of a tiny model and of the same without layers 2 and 3."""
    return save_cut(tmp_path_factory.mktemp("tiny"), tiny_llama(6), words)


@pytest.fixture(scope="session")
def cut(both):
    return both[1]


@pytest.fixture(scope="session")
def healed(cut, tmp_path_factory):
    """Adapters of a quick healing, and its record."""
    out = tmp_path_factory.mktemp("healed") / "adapters"
    return out, sh.heal(cut, TEXTS, out, recipe=QUICK, eval_texts=HELD_OUT)


@pytest.fixture(scope="session")
def smol_cut(smol, passages, tmp_path_factory):
    """SmolLM2-135M in bfloat16 without layers 12 .. 19, on disk, and texts."""
    model, tokenizer = sh.load_model(demo.model_path(), dtype="bfloat16")
    path = tmp_path_factory.mktemp("smol") / "cut"
    plan = sh.drop_layers(model, [range(12, 20)])
    sh.save_model(model, tokenizer, path, plan=plan)
    yield path, passages[0]
    shutil.rmtree(path)
