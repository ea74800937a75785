"""Losses of models on fake CUDA devices, and the texts that they continue."""

from shallower.runs.continuing import continue_text

from shallower.evaluation.loss import evaluate_loss
from tests.conftest import word_tokenizer
from tests.devices.batches import TEXTS

WORDS = word_tokenizer()


def test_the_loss(stage):
    with stage.open():
        loss = evaluate_loss(stage.model(), WORDS, TEXTS, batch_size=3, progress=False)
    assert loss.num_tokens == sum(len(text.split()) - 1 for text in TEXTS)
    assert loss.vocab_size == 32000


def test_a_text_is_continued(stage):
    with stage.open():
        assert continue_text(stage.model(), WORDS, "w3 w4").startswith("w1")
