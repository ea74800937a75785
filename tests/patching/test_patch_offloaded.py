"""A model whose weights are offloaded is patched as one in memory, bit for bit."""

import copy

import pytest
import torch

import shallower as sh
from shallower.models.offload import stored_weight
from shallower.patching import descent, least_squares
from tests.examples import sentences
from tests.models.offloaded import offloaded

TEXTS = sentences(48, seed=1)


pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture(scope="module")
def plain(learned, words, few_steps):
    """A model in memory that was patched, and what was said of it."""
    model = copy.deepcopy(learned)
    return model, sh.patch(model, words, [range(2, 6)], texts=TEXTS, progress=False)


def weights(model):
    return {
        f"{path}.{name}": stored_weight(module, name).detach().clone()
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "layers",
    [pytest.param(None, marks=pytest.mark.slow), [1, 2, 4, 6]],
    ids=["whole", "some layers"],
)
def test_it_gets_the_same_weights(learned, words, plain, layers):
    """By least squares and all the way down."""
    model = offloaded(copy.deepcopy(learned), layers)
    done = sh.patch(model, words, [range(2, 6)], texts=TEXTS, progress=False)
    assert done == plain[1]
    assert done.descent
    assert equal(weights(plain[0]), weights(model))
    sh.drop_layers(cut := copy.deepcopy(learned), [range(2, 6)])
    assert not equal(weights(plain[0]), weights(cut))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_it_is_saved_as_any(learned, words, tmp_path):
    model = offloaded(copy.deepcopy(learned))
    done = sh.patch(model, words, [range(2, 6)], texts=TEXTS, progress=False)
    sh.save_patched(model, words, tmp_path / "patched", done=done)
    again, _ = sh.load_model(tmp_path / "patched", dtype="float32", device_map="cpu")
    assert equal(weights(again), weights(model))
    assert sh.evaluate_loss(again, words, TEXTS[:8]) == sh.evaluate_loss(model, words, TEXTS[:8])


def test_it_is_as_before_where_a_patch_does_not_help(learned, words, monkeypatch):
    monkeypatch.setattr(least_squares, "RIDGES", (1e12,))
    monkeypatch.setattr(descent, "RATE", 0.0)
    model = offloaded(copy.deepcopy(learned))
    with pytest.raises(sh.PatchError, match="does not help"):
        sh.patch(model, words, [range(2, 6)], texts=TEXTS, progress=False)
    assert equal(weights(model), weights(learned))
