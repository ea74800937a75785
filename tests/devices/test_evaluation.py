"""Losses of models on fake CUDA devices, and the texts that they continue."""

import numpy as np

from shallower.evaluation.loss import evaluate_loss
from shallower.judgement.compare import compare_cuts
from shallower.runs.continuing import continue_text
from shallower.scanning.analyse import analyse_states
from tests.conftest import word_tokenizer
from tests.devices.batches import TEXTS

WORDS = word_tokenizer()


def test_the_loss(stage):
    with stage.open():
        loss = evaluate_loss(stage.model(), WORDS, TEXTS, batch_size=3, progress=False)
    assert loss.num_tokens == sum(len(text.split()) - 1 for text in TEXTS)
    assert loss.vocab_size == 32000


def test_the_losses_of_cuts(stage):
    states = np.random.default_rng(0).normal(size=(8, 5, 16)).astype(np.float32)
    scanned = analyse_states(states)
    with stage.open():
        found = compare_cuts(
            stage.model(), WORDS, scanned, texts=TEXTS, sizes=[1, 2], batch_size=3, progress=False
        )
    assert len(found.cuts) == 4


def test_a_text_is_continued(stage):
    with stage.open():
        assert continue_text(stage.model(), WORDS, "w3 w4").startswith("w1")
