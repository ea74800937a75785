"""Batches of an evaluation, measured in parts: the forwards are those of one process."""

import numpy as np
import pytest

import shallower as sh
from shallower import TextsError
from shallower.evaluation import loss as losses
from shallower.evaluation.batches import batches_of_texts, batches_of_windows
from shallower.evaluation.loss import scores_of
from shallower.models.decoder import Decoder
from shallower.values.shard import Shard
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow
from tests.documents import documents


@pytest.fixture
def forwards(monkeypatch):
    """The token ids, padded, of every forward, and its texts."""
    seen, plain = [], losses.text_losses

    def noted(head, batch, halving):
        seen.append((batch.input_ids.tolist(), batch.samples.tolist()))
        return plain(head, batch, halving)

    monkeypatch.setattr(losses, "text_losses", noted)
    return seen


def parts_of(model, every, count):
    """The nats by text of all shards, one after the other."""
    sums = np.full(every.num_items, np.nan)
    for index in range(count):
        looks = Shard(index, count).of(len(every.batches))
        mine, _ = scores_of(Decoder.of(model), every, looks=looks, progress=False)
        there = np.isfinite(mine.sums)
        assert there.sum() == sum(len(every.batches[look]) for look in looks)
        sums[there] = mine.sums[there]
    return sums.tolist()


@pytest.mark.parametrize("count", mostly_slow([1, 4, 64], [64]))
def test_texts_meet_the_forwards_that_one_process_makes(llama, words, forwards, count):
    texts = documents(70)
    whole = sh.evaluate_loss(llama, words, texts, batch_size=3, progress=False)
    expected = forwards[:]
    forwards.clear()
    every = batches_of_texts(words, texts, Tokens(256, 3))
    found = parts_of(llama, every, count)
    assert forwards == expected
    assert found == whole.by_text.sums.tolist()
    assert every.num_items == 70


def test_windows_meet_the_forwards_that_one_process_makes(llama, words, forwards):
    text = " ".join(documents(20))
    options = {"context": 16, "bos": False}
    sh.evaluate_perplexity(llama, words, text, **options, batch_size=3, progress=False)
    expected = forwards[:]
    forwards.clear()
    parts_of(llama, batches_of_windows(words, text, Tokens(16, 3), bos=False), 4)
    assert forwards == expected


def test_texts_of_which_none_can_be_predicted_are_refused(words):
    with pytest.raises(TextsError, match="no text has two tokens"):
        batches_of_texts(words, ["", "w1"], Tokens(256, 3))
