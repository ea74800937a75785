"""Answers to tasks, and forwards that are timed, on fake CUDA devices."""

from types import SimpleNamespace

import pytest

from shallower.evaluation.task_model import TaskModel
from shallower.models.decoder import Decoder
from shallower.savings import timing
from tests.conftest import word_tokenizer

WORDS = word_tokenizer()


def requests(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def answering(stage):
    return TaskModel(Decoder.of(stage.model()), WORDS, batch_size=2, progress=False)


def test_options_are_scored(stage):
    asked = requests(("w3 w4 w5", " w6"), ("w3 w4 w5", " w7 w8"), ("w9", " w1"))
    with stage.open():
        found = answering(stage).loglikelihood(asked)
    assert len(found) == 3


def test_answers_are_generated(stage):
    way = {"until": ["w99"], "max_gen_toks": 2}
    with stage.open():
        found = answering(stage).generate_until(requests(("w3 w4", way), ("w5", way)))
    assert len(found) == 2


@pytest.mark.slow
def test_tokens_are_decoded_from_a_cache(stage):
    with stage.open():
        timing._decode(stage.model(), 8, 2)
