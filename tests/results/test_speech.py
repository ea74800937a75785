"""Speech: means of measures by prompt, pairs, and what is read again from a file."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import Speech, TextsError
from shallower.results.scores import Scores
from shallower.results.speech import MEASURES, WAYS, repeated
from tests.results.speeches import made
from tests.values.damage import damaged


def test_a_mean_is_over_both_ways_and_its_error_over_prompts():
    speech = made()
    for name in MEASURES:
        sums = sum(speech.scores[way][name].sums for way in WAYS)
        weights = sum(speech.scores[way][name].weights for way in WAYS)
        mean = sums.sum() / weights.sum()
        assert speech.mean(name) == pytest.approx(mean, rel=1e-12)
        error = math.sqrt(5 / 4 * ((sums - mean * weights) ** 2).sum()) / weights.sum()
        assert speech.of(name).stderr == pytest.approx(error, rel=1e-9)
        for way in WAYS:
            assert speech.of(name, way) is speech.scores[way][name]
    assert speech.num_prompts == 5
    plain = speech.to_json()
    assert plain["agreement"] == speech.mean("agreement")
    assert plain["stderr"]["departure"] == speech.of("departure").stderr
    assert plain["sampled"]["loss"] == speech.scores["sampled"]["loss"].mean
    assert plain["whole"]["length"] == speech.of_whole("length").mean
    assert plain["tokens"] == speech.of("agreement").weights.sum()


def test_a_single_prompt_has_no_error():
    plain = made(1).to_json()
    assert set(plain["stderr"].values()) == {None}
    json.dumps(plain, allow_nan=False)


def test_a_pair_is_paired_by_prompt():
    one, other = made(seed=1), made(seed=2)
    found = one.minus(other)
    assert set(found) == set(MEASURES)
    for name, lost in found.items():
        assert lost == one.of(name).minus(other.of(name))
    zero = one.minus(one)
    assert all(lost.mean == 0 and lost.tied for lost in zero.values())


def test_speech_of_other_words_is_not_paired():
    """Even if the words are as many."""
    with pytest.raises(TextsError, match="speech of different words cannot be paired: measure"):
        made(seed=1).minus(made(seed=2, words="1" * 64))


@pytest.mark.parametrize(
    ("own", "whole", "repeats"),
    [([9, 9, 9, 9], [4, 4, 4, 4], True), ([8, 8, 8, 8], [4, 4, 4, 4], False),
     ([30, 0, 0, 0], [4, 3, 4, 3], False), ([1, 1, 1, 2], [0, 0, 0, 0], True),
     ([0, 0, 0, 0], [0, 0, 0, 0], False)],
    ids=["twice and more", "twice", "one prompt alone", "the whole never", "neither"],
)  # fmt: skip
def test_a_model_repeats_itself_at_more_than_twice_and_no_tie(own, whole, repeats):
    def by_way(sums):
        scores = Scores(np.array(sums, float), np.full(len(sums), 40.0))
        return {way: {"repetition": scores} for way in WAYS}

    assert made(scores=by_way(own), whole=by_way(whole)).repeats == repeats


def test_answers_too_short_to_repeat_themselves_are_no_repetition():
    nothing = {way: {"repetition": Scores(np.zeros(3), np.zeros(3))} for way in WAYS}
    some = {way: {"repetition": Scores(np.ones(3), np.full(3, 9.0))} for way in WAYS}
    assert not made(scores=some, whole=nothing).repeats
    assert not made(scores=nothing, whole=some).repeats
    assert not made(scores=nothing, whole=nothing).repeats


@given(st.lists(st.integers(0, 2), max_size=40))
def test_repetition_is_that_of_a_plain_count(words):
    grams = [words[i : i + 4] for i in range(len(words) - 3)]
    before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repeated(words) == (before, len(grams))


def same(one, other):
    assert (one.num_tokens, one.seed, one.words) == (other.num_tokens, other.seed, other.words)
    for name in ("scores", "whole"):
        for way in WAYS:
            first, second = (getattr(speech, name)[way] for speech in (one, other))
            assert first.keys() == second.keys()
            for measure, scores in first.items():
                np.testing.assert_array_equal(scores.sums, second[measure].sums)
                np.testing.assert_array_equal(scores.weights, second[measure].weights)


def test_a_record_is_read_again_and_a_figure_is_no_record():
    speech = made(7, by_token={way: {"loss": [np.ones(3)]} for way in WAYS})
    text = json.dumps(speech.to_record(), allow_nan=False)
    read = Speech.from_json(json.loads(text))
    same(read, speech)
    assert read.by_token is None
    assert json.dumps(read.to_record()) == text
    with pytest.raises(KeyError, match="by_prompt"):
        Speech.from_json(speech.to_json())


RECORD = json.loads(json.dumps(made(2).to_record()))


@given(damaged(RECORD))
def test_what_is_damaged_is_refused_or_harmless(document):
    try:
        read = Speech.from_json(document)
    except (KeyError, TypeError, ValueError):
        return
    assert {*read.scores} == {*read.whole} == {*WAYS}
    read.to_record()
    read.minus(read)
    assert read.repeats in (True, False)
