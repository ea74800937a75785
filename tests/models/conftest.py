"""Checkpoints to load."""

import pytest

from shallower.models.loading import load_model
from tests.conftest import tiny_llama
from tests.models.checkpoints import wide_llama


@pytest.fixture
def checkpoint(words, tmp_path):
    """The folder of a tiny checkpoint, to be spoilt."""
    folder = tmp_path / "checkpoint"
    tiny_llama().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide(words, tmp_path_factory):
    """The folder of a checkpoint that can be quantised. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("wide") / "wide-llama"
    wide_llama().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(params=["nf4", "int8"])
def quantised(request, wide):
    return load_model(wide, request.param)[0]
