"""Answers that are kept: what was written once is not written again."""

import copy

import numpy as np
import pytest
import torch

import shallower as sh
from shallower.evaluation.answers import write_answers
from shallower.models.decoder import Decoder
from shallower.store.given_models import ModelStore
from shallower.store.store import Store
from shallower.studies.answers import AT_ONCE, KeptAnswers
from tests.conftest import tiny_llama

PROMPTS = [np.random.default_rng(i).integers(0, 97, 2 + i % 5) for i in range(2 * AT_ONCE + 3)]
OPTIONS = {"num_tokens": 4, "seed": 1, "progress": False}


@pytest.fixture
def model():
    return tiny_llama(2, initializer_range=0.2)


@pytest.fixture
def forwards(model):
    """The forwards of the model, as a list that grows."""
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    return seen


def kept(folder, model="m"):
    return KeptAnswers(ModelStore(Store(folder), {"model": model}, []))


def test_answers_are_kept_part_by_part(model, words, tmp_path, forwards):
    decoder = Decoder.of(model)
    expected = write_answers(decoder, words, PROMPTS, **OPTIONS)
    assert kept(tmp_path).write(decoder, words, PROMPTS, **OPTIONS) == expected
    del forwards[:]
    assert kept(tmp_path).write(decoder, words, PROMPTS, **OPTIONS) == expected
    first = kept(tmp_path).write(decoder, words, PROMPTS[:AT_ONCE], **OPTIONS)
    assert first == expected[:AT_ONCE]
    assert not forwards


def test_after_a_kill_only_the_rest_is_written(model, words, tmp_path, forwards, monkeypatch):
    decoder = Decoder.of(model)
    asked = []

    def write(decoder, tokenizer, prompts, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return write_answers(decoder, tokenizer, prompts, **options)

    monkeypatch.setattr("shallower.evaluation.answers.write_answers", write)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path).write(decoder, words, PROMPTS, **OPTIONS)
    assert asked == [AT_ONCE, AT_ONCE]
    del asked[:]
    again = kept(tmp_path).write(decoder, words, PROMPTS, **OPTIONS)
    assert asked == [3]
    monkeypatch.undo()
    assert again == write_answers(decoder, words, PROMPTS, **OPTIONS)


@pytest.mark.parametrize(
    "changed", [{"num_tokens": 5}, {"seed": 2}, {"seed": None}, {"batch_size": 7}]
)
def test_other_settings_are_other_answers(model, words, tmp_path, changed, forwards):
    decoder = Decoder.of(model)
    kept(tmp_path).write(decoder, words, PROMPTS[:3], **OPTIONS)
    del forwards[:]
    options = {**OPTIONS, **changed}
    found = kept(tmp_path).write(decoder, words, PROMPTS[:3], **options)
    assert forwards
    assert found == write_answers(decoder, words, PROMPTS[:3], **options)


def test_other_prompts_models_and_ends_are_other_answers(model, words, tmp_path, forwards):
    decoder = Decoder.of(model)
    (first,) = kept(tmp_path).write(decoder, words, PROMPTS[:1], **OPTIONS)
    (other,) = kept(tmp_path).write(decoder, words, PROMPTS[1:2], **OPTIONS)
    assert other.given != first.given
    torch.nn.init.zeros_(model.lm_head.weight)
    (third,) = kept(tmp_path, "another").write(decoder, words, PROMPTS[:1], **OPTIONS)
    assert third.written != first.written
    assert kept(tmp_path).write(decoder, words, PROMPTS[:1], **OPTIONS) == [first]
    model.generation_config.eos_token_id = [first.written[0]]
    assert kept(tmp_path).write(decoder, words, PROMPTS[:1], **OPTIONS) != [first]


class Damaged:
    """A store that gives what it was told to."""

    def __init__(self, value):
        self.value = value

    def get(self, *_):
        return self.value


GIVEN = PROMPTS[0].tolist()
ANSWER = {"given": GIVEN, "written": [1, 2], "ended": True}


@pytest.mark.parametrize(
    "value",
    [
        {}, {"answers": []}, {"answers": [ANSWER, ANSWER]}, {"answers": [[]]},
        {"answers": [{**ANSWER, "written": ["1"]}]}, {"answers": [{**ANSWER, "written": []}]},
        {"answers": [{**ANSWER, "given": [1]}]}, {"answers": [{**ANSWER, "more": 1}]},
    ],
)  # fmt: skip
def test_a_damaged_entry_is_told(model, words, value):
    decoder = Decoder.of(model)
    whole = Damaged({"answers": [ANSWER]})
    (found,) = KeptAnswers(whole).write(decoder, words, PROMPTS[:1], **OPTIONS)
    assert (found.given, found.written, found.ended) == (tuple(GIVEN), (1, 2), True)
    with pytest.raises(sh.CacheError, match="an entry of the cache is no answers: "):
        KeptAnswers(Damaged(value)).write(decoder, words, PROMPTS[:1], **OPTIONS)


def test_what_cannot_be_answered_is_refused_before_the_store_is_asked(model, words, monkeypatch):
    asking = KeptAnswers(Damaged(None))
    with pytest.raises(sh.TextsError, match="no prompts to answer"):
        asking.write(Decoder.of(model), words, [], **OPTIONS)
    monkeypatch.setattr(type(model), "can_generate", classmethod(lambda _: False))
    with pytest.raises(sh.ModelError, match="cannot generate text"):
        asking.write(Decoder.of(copy.deepcopy(model)), words, PROMPTS[:1], **OPTIONS)
