"""A checkpoint to cut."""

import operator
import shutil

import pytest

import shallower as sh
from shallower.studies import demo
from tests.conftest import tiny_llama
from tests.cutting.card_tools import assert_same_weights, stand_for, ways
from tests.cutting.gguf_files import CUT
from tests.folders import tree, without_result_record


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


@pytest.fixture
def carried_out(tmp_path, monkeypatch, shallower):
    """Carry out every way of a card, in a place each where ``SOURCE`` is the source, if any.

    It makes the weights and the card that it lies beside or, of a whole folder, all files.
    """

    def run(card, first, source=None, *, plan=None, whole=False):
        for name, make in ways(card, shallower).items():
            place = stand_for(tmp_path / f"{first.name}, {name}", source)
            if plan is not None:
                plan.save(place / "shallower_plan.json")
            monkeypatch.chdir(place)
            make()
            if whole:
                (place / "SOURCE").unlink(missing_ok=True)
                assert without_result_record(tree(place)) == tree(first)
                continue
            assert_same_weights("cut", first)
            assert (place / "cut" / "README.md").read_text() == card
            plans = (sh.Plan.load(at / "shallower_plan.json") for at in (first, place / "cut"))
            assert operator.eq(*plans)

    return run
