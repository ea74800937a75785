"""Speech, for people and for machines."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from shallower.reporting.stories.evaluation import (
    evaluation_json,
    evaluation_parts,
    repeats_warning,
    speech_json,
    speech_table,
)
from shallower.reporting.stories.run import run_story, speech_section
from shallower.reporting.words import domain_learned
from shallower.results.scores import Estimate, Scores
from shallower.results.speech import MEASURES, WAYS
from tests.reporting.stories import made_run
from tests.results.speeches import made

SHARES = ("agreement", "acceptance", "repetition", "ends")


def test_a_row_for_every_measure_and_the_difference_of_two():
    one, other = made(seed=1), made(seed=2)
    table = speech_table({"all layers": one, "without [1, 3)": other})
    assert table.head == ("", "all layers", "without [1, 3)", "difference")
    assert len(table.rows) == len(MEASURES)
    for name, (_, first, second, lost) in zip(MEASURES[:5], table.rows[:5], strict=True):
        scale, digits = (100, 1) if name in SHARES else (1, 3)
        for cell, speech in ((first, one), (second, other)):
            mean, error = (scale * value for value in (speech.mean(name), speech.of(name).stderr))
            assert cell.text == f"{mean:.{digits}f} ± {error:.{digits}f}"
            assert cell.value == pytest.approx(mean)
        found = other.minus(one)[name]
        assert lost.text.startswith("= ") == found.tied
        assert f"{scale * found.mean:+.{digits}f} ± " in lost.text
        assert lost.value == pytest.approx(scale * found.mean)  # by which the column is sorted
    assert "5 prompts, answers of 16 tokens at most, greedy and sampled" in table.note
    assert "; = a tie" in table.note


def test_models_beyond_two_have_no_difference(printed):
    models = {name: made(seed=seed) for seed, name in enumerate(("whole", "cut", "patched"))}
    assert speech_table(models).head == ("", "whole", "cut", "patched")
    text = printed(speech_table(models))
    assert max(map(len, text.splitlines())) <= 80
    assert "= a tie" not in text


def test_what_counts_nothing_is_a_dash_and_no_tie():
    def nothing(speech):
        none = Scores(np.zeros(5), np.zeros(5))
        scores = {way: {**speech.scores[way], "repetition": none} for way in WAYS}
        return replace(speech, scores=scores)

    one, other = nothing(made(seed=1)), nothing(made(seed=2))
    row = next(row for row in speech_table({"a": one, "b": other}).rows if "repeated" in row[0])
    assert [cell.text for cell in row[1:]] == ["–", "–", "–"]
    plain = speech_json([one, other])
    assert plain["repetition"] is None
    assert plain["difference"]["repetition"]["mean"] is None
    json.dumps(plain, allow_nan=False)


def test_json_is_of_the_cut_with_its_difference():
    one, other = made(seed=1), made(seed=2)
    plain = evaluation_json({"speech": {"base": one, "cut": other}})["speech"]
    assert plain["acceptance"] == other.mean("acceptance")
    assert plain["difference"]["acceptance"] == other.minus(one)["acceptance"].to_json()
    assert set(plain["difference"]) == set(MEASURES)
    alone = evaluation_json({"speech": {"base": one}})["speech"]
    assert alone == one.to_json()
    (table,) = evaluation_parts({"speech": {"base": one}}, {"base": "all layers"})
    assert table.head == ("", "all layers")


# The section of a run.
def test_a_run_says_how_its_models_speak(tmp_path):
    done = made_run(tmp_path)
    section = speech_section(done)
    first, _ = section.lines
    patched, whole = done.speech["patched"], done.speech["whole"]
    assert f"the patched model would accept {100 * patched.mean('acceptance'):.0f} %" in first
    assert f"depart after {patched.mean('departure'):.1f} tokens" in first
    lost = patched.minus(whole)["loss_under_whole"]
    assert f"{lost.mean:.2f} ± {lost.stderr:.2f} nats a token more than on its own, a tie" in first
    (table,) = section.tables
    assert table.head == ("", "whole", "cut", "patched")
    (sample,) = section.samples
    assert sample.continued == {
        "whole": "A plan is good.\n\nAnd more.", "cut": "a a a", "patched": "fine"
    }  # fmt: skip
    assert "How it speaks" in [one.title for one in run_story(done, drawn=False).sections]


def repeating(speech, rate):
    """Speech with so many repeated 4-grams, and a whole model with one in ten."""

    def by_way(share):
        return {way: Scores(np.full(9, 40 * share) + np.arange(9) / 9, np.full(9, 40.0))
                for way in WAYS}  # fmt: skip

    scores = {way: {**speech.scores[way], "repetition": by_way(rate)[way]} for way in WAYS}
    whole = {way: {**speech.whole[way], "repetition": by_way(0.1)[way]} for way in WAYS}
    return replace(speech, scores=scores, whole=whole)


@pytest.mark.parametrize(("rate", "warned"), [(0.6, True), (0.15, False)])
def test_a_recommended_model_that_repeats_itself_is_warned_of(tmp_path, rate, warned):
    done = made_run(tmp_path)
    speech = {**done.speech, "patched": repeating(done.speech["patched"], rate)}
    found = run_story(replace(done, speech=speech), drawn=False).warnings
    said = "the patched model repeats itself: 61.1 % of its 4-grams were there before, and 11.1 %"
    assert any(said in one for one in found) == warned
    cut = {**done.speech, "cut": repeating(done.speech["cut"], 0.6)}  # which nobody recommends
    found = run_story(replace(done, speech=cut), drawn=False).warnings
    assert not any("repeats itself" in one for one in found)
    assert math.isclose(repeating(done.speech["cut"], rate).mean("repetition"), rate + 1 / 90)
    assert repeats_warning("cut", cut["cut"]).startswith("the cut model repeats itself")


@pytest.mark.parametrize(("patched", "warned"), [(-0.1, True), (0.2, False)])
def test_a_patched_model_that_is_better_than_the_whole_one_is_warned_of(tmp_path, patched, warned):
    found = run_story(made_run(tmp_path, patched=patched), drawn=False).warnings
    assert any("has learned the domain of its texts" in one for one in found) == warned


@pytest.mark.parametrize(
    ("inside", "outside", "warned"),
    [
        ((0.88, 0.03), (0.12, 0.02), True),  # few texts of one source
        ((0.755, 0.012), (0.617, 0.007), False),  # many
        ((0.88, 0.03), (0.40, 0.05), False),  # less than half of it, within the errors
        ((1.06, 0.02), (0.90, 0.02), True),  # better than the whole model
        ((1.02, 0.02), (0.90, 0.02), False),
        ((math.nan, math.nan), (0.1, 0.02), False),
    ],
)
def test_a_model_that_has_learned_a_domain_is_warned_of(inside, outside, warned):
    shares = {"the test set": Estimate(*inside), "out-of-domain texts": Estimate(*outside)}
    found = domain_learned(shares)
    assert bool(found) == warned
    assert not domain_learned({})
    for place, one in shares.items() if warned else ():
        assert f"{100 * one.mean:.0f} ± {100 * one.stderr:.0f} %" in found[0]
        assert f"on {place}" in found[0]


def test_speech_that_recovers_far_less_than_the_loss_is_warned_of(tmp_path):
    done = made_run(tmp_path, patched=0.1)
    sums = np.full(9, 60.0)

    def diverging(speech, nats):
        one = Scores(nats * sums, sums)
        scores = {way: {**speech.scores[way], "divergence": one} for way in WAYS}
        return replace(speech, scores=scores)

    for back, warned in ((0.2, True), (0.7, False)):
        states = {"whole": 0.0, "cut": 1.0, "patched": 1 - back}
        speech = {name: diverging(done.speech[name], nats) for name, nats in states.items()}
        found = [one for one in replace(done, speech=speech).warnings if "domain" in one]
        assert bool(found) == warned
