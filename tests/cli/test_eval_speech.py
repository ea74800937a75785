"""``shallower eval --speech``: how a cut, or another checkpoint, speaks beside the whole model."""

import json
from pathlib import Path

import pytest
import torch

import shallower as sh
from shallower.results.speech import MEASURES
from tests.cli.test_eval import renamed as renamed

PROMPTS = ["w1 w2 w3", "w4", "w7 w8 w9 w10 w11"]


@pytest.fixture(scope="session")
def asked(tmp_path_factory):
    """A file of prompts."""
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in PROMPTS))
    return path


@pytest.fixture
def at_rest(monkeypatch):
    """No model may be loaded, and no forward run."""
    monkeypatch.setattr("shallower.models.loading.load_weights", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: 1 / 0)


def evaluated(tiny, asked, layers, **options):
    """What Python says of a cut of the tiny model, which lies there without the layers."""
    whole, tokenizer = sh.load_model(tiny, progress=False)
    cut, _ = sh.load_model(tiny, progress=False)
    if layers:
        sh.drop_layers(cut, layers)
    return sh.evaluate_speech(cut, tokenizer, asked, whole=whole, progress=False, **options)


def test_json_has_all_measures_of_the_cut_and_their_differences(shallower, tiny, asked):
    command = ("eval", tiny, "--speech", asked, "--speech-tokens", 4, "--seed", 4, "--drop", "1:3")
    done = shallower(*command, "--json")
    assert done.status == 0, done.err
    assert set(done.json) == {"speech", "dtype", "drop"}
    found = done.json["speech"]
    assert {
        "agreement", "acceptance", "divergence", "loss", "departure", "repetition", "length",
        "loss_under_whole", "ends", "stderr", "prompts", "whole", "greedy", "sampled",
        "difference",
    } <= set(found)  # fmt: skip
    expected = evaluated(tiny, asked, [1, 2], num_tokens=4, seed=4)
    itself = evaluated(tiny, asked, [], num_tokens=4, seed=4)
    assert found["words"] == expected.words
    lost = expected.minus(itself)
    for name in MEASURES:
        assert found[name] == pytest.approx(expected.mean(name), rel=1e-6)
        assert found["stderr"][name] == pytest.approx(expected.of(name).stderr, rel=1e-5, abs=1e-9)
        for way in ("greedy", "sampled"):
            assert found[way][name] == pytest.approx(expected.of(name, way).mean, rel=1e-6)
        assert found["difference"][name]["mean"] == pytest.approx(lost[name].mean, abs=1e-6)
    assert found["prompts"] == len(PROMPTS)
    assert (found["num_tokens"], found["seed"]) == (4, 4)
    assert found["whole"]["length"] == expected.of_whole("length").mean


def test_what_was_measured_runs_no_forward_again(shallower, tiny, asked, request):
    command = ("eval", tiny, "--speech", asked, "--speech-tokens", 3, "--drop", "2")
    first = shallower(*command, "--json")
    assert first.status == 0, first.err
    request.getfixturevalue("at_rest")
    again = shallower(*command, "--json")
    assert again.json == first.json
    assert "cached, measured" in again.err
    for more in ((), ("--out", "out")):
        told = shallower(*command, *more)
        assert told.status == 0, told.err
        for part in ("likeliest token agrees, %", "all layers", "without [2,", "= a tie"):
            assert part in told.out
    assert json.loads(Path("out/eval.json").read_text())["speech"] == first.json["speech"]
    alone = shallower("eval", tiny, "--speech", asked, "--speech-tokens", 3, "--json").json
    assert alone["speech"]["acceptance"] == 1
    assert "difference" not in alone["speech"]


# The prompts.
def test_prompts_of_our_own_need_no_value(shallower, tiny):
    options = ("--drop", "1", "--speech-tokens", 2, "--json", "--dry-run")
    for words in (("--speech", *options), (*options, "--speech")):
        assert shallower("eval", tiny, *words).json["speech"] == "prompts of our own"


def test_each_checkpoint_keeps_its_own_words(shallower, tiny, models, asked, folder):
    """What one said as the whole model beside another is not taken for the other's."""
    options = ("--speech", asked, "--speech-tokens", 2, "--json")
    other = folder / "other"
    model, tokenizer = sh.load_model(tiny, progress=False)
    torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.weight)
    sh.save_model(model, tokenizer, other)
    against = {}
    for first, second in ((other, tiny), (tiny, other)):
        done = shallower("eval", first, "--against", second, *options)
        assert done.status == 0, done.err
        against[first] = done.json["speech"]
    assert against[other]["words"] != against[tiny]["words"]
    for place in (other, tiny):
        fresh = shallower("eval", place, *options, "--no-cache").json["speech"]
        assert shallower("eval", place, *options).json["speech"] == fresh
    torch.nn.init.normal_(model.model.layers[1].mlp.down_proj.weight)
    sh.save_model(model, tokenizer, folder / "third")
    found = shallower("eval", other, "--against", folder / "third", *options).json["speech"]
    assert found["words"] not in (against[other]["words"], against[tiny]["words"])


@pytest.mark.usefixtures("at_rest")
def test_another_tokenizer_is_one_sentence(shallower, tiny, asked, renamed):
    said = shallower("eval", renamed, "--against", tiny, "--speech", asked).error
    assert "different tokenizers: prompt 0 becomes other tokens, so their speech" in said
