"""Comparison of blocks by the loss without them."""

import pytest
import torch

import shallower as sh
from shallower import Block, LayersError, TextsError
from tests.conftest import tiny_llama
from tests.documents import HELD_OUT, TEXTS, Unread, assert_same, once, state_of


# Comparing cuts.
@pytest.fixture
def scanned(llama, words):
    return sh.scan(llama, words, TEXTS)


def test_a_comparison_measures_the_best_and_the_deepest_block_of_every_size(llama, words, scanned):
    comparison = sh.compare_cuts(llama, words, scanned, texts=HELD_OUT, sizes=[1, 3])
    assert comparison.base == sh.evaluate_loss(llama, words, HELD_OUT)
    assert [(cut.strategy, cut.block) for cut in comparison.cuts] == [
        ("similarity", scanned.best_block(1)),
        ("deepest", Block(4, 5)),
        ("similarity", scanned.best_block(3)),
        ("deepest", Block(2, 5)),
    ]
    for cut in comparison.cuts:
        with sh.without_layers(llama, [cut.block]):
            assert cut.loss == sh.evaluate_loss(llama, words, HELD_OUT)
        where = cut.block.start, cut.block.stop
        assert cut.block.score == scanned.mean()[where]
        assert cut.block.stderr == scanned.stderr()[where]


def test_a_comparison_by_cosine_scores_by_one_minus_cosine(llama, words):
    scanned = sh.scan(llama, words, TEXTS, metrics=("cosine",))
    comparison = sh.compare_cuts(llama, words, scanned, texts=HELD_OUT, sizes=[2])
    for cut in comparison.cuts:
        expected = 1 - scanned.mean("cosine")[cut.block.start, cut.block.stop]
        assert cut.block.score == expected


def test_a_block_that_is_best_and_deepest_has_two_rows_of_one_loss(words):
    llama = tiny_llama(num_layers=2)
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.zero_()
        llama.model.layers[0].self_attn.o_proj.weight.zero_()
    scanned = sh.scan(llama, words, TEXTS)
    best, deepest = sh.compare_cuts(llama, words, scanned, texts=HELD_OUT, sizes=[1]).cuts
    assert best.block == deepest.block == Block(0, 1)
    assert best.block.score == deepest.block.score == 0
    assert best.loss == deepest.loss
    assert {best.strategy, deepest.strategy} == {"similarity", "deepest"}


def test_held_out_texts_may_be_an_iterator(llama, words, scanned):
    expected = sh.compare_cuts(llama, words, scanned, texts=HELD_OUT, sizes=[1, 2])
    assert sh.compare_cuts(llama, words, scanned, texts=once(HELD_OUT), sizes=[1, 2]) == expected


def test_a_comparison_leaves_the_model_as_it_was(llama, words, scanned):
    llama.train()
    before = state_of(llama)
    sh.compare_cuts(llama, words, scanned, texts=HELD_OUT, sizes=[1, 2, 5])
    assert_same(before, state_of(llama))


def test_a_failing_comparison_leaves_the_model_as_it_was(llama, words, scanned):
    before = state_of(llama)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt

    handle = llama.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sh.compare_cuts(llama, words, scanned, texts=HELD_OUT, sizes=[2])
    handle.remove()
    assert_same(before, state_of(llama))


@pytest.mark.parametrize("sizes", [[0], [6], [1, 99], [-1], []])
def test_sizes_that_the_model_cannot_lose_are_refused_before_any_work(
    llama, words, scanned, sizes, tmp_path
):
    with pytest.raises(LayersError):
        sh.compare_cuts(llama, words, scanned, texts=Unread(), sizes=sizes)
    for n in (size for size in sizes if size != 1):
        with pytest.raises(LayersError):
            sh.run(llama, words, Unread(), eval_texts=Unread(), out=tmp_path / "out", n=n)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
@pytest.mark.parametrize("texts", [[], [""], ["w1"]])
def test_a_comparison_needs_a_text_of_two_tokens(llama, words, scanned, texts):
    with pytest.raises(TextsError):
        sh.compare_cuts(llama, words, scanned, texts=texts, sizes=[1])


def test_a_scan_of_another_depth_is_refused(words, scanned):
    with pytest.raises(sh.ShallowerError):
        sh.compare_cuts(tiny_llama(num_layers=8), words, scanned, texts=HELD_OUT, sizes=[1])
