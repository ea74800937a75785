"""A checkpoint to cut."""

import shutil

import pytest

import shallower as sh
from shallower.runs import demo
from tests.conftest import tiny_llama
from tests.cutting.gguf_files import CUT


@pytest.fixture(scope="session")
def source(tmp_path_factory, words):
    """A random Llama of 6 layers in many shards, its tokenizer, and things beside them."""
    folder = tmp_path_factory.mktemp("stored") / "tiny"
    tiny_llama(initializer_range=0.2).save_pretrained(folder, max_shard_size="20KB")
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(source, tmp_path):
    """A copy of ``source`` to do harm to."""
    return shutil.copytree(source, tmp_path / "source")


@pytest.fixture(scope="session")
def real():
    return demo.model_path()


@pytest.fixture(scope="session")
def cut(real, tmp_path_factory):
    """The real model without layers 12 .. 19."""
    out = tmp_path_factory.mktemp("gguf") / "cut.gguf"
    sh.prune(real, CUT, out)
    return out
