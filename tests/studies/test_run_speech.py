"""How the models of a run speak: as evaluate_speech says, and what the page shows of it."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import shallower as sh
from shallower.evaluation import answers
from shallower.reporting.report import read_story
from shallower.reporting.results import Run
from shallower.results.speech import MEASURES, WAYS
from shallower.studies.run import RunStudy
from shallower.studies.speaking import NUM_SAMPLES
from tests.documents import assert_same, state_of
from tests.evaluation.answering import plain_answer
from tests.healing.cuts import documents
from tests.studies.conftest import FEW_WORDS

TEXTS, REPORT = documents(80, 5), documents(12, 1)
PROMPTS = ["w5 w7 w11", "w1 w2", {"prompt": "w40 w41 w42 w43"}, "w9", "w60 w62 w64"]
TAKEN = {"eval_texts": REPORT, "max_length": 16, "top": 1, "n": 1, "prompts": PROMPTS}


pytestmark = pytest.mark.usefixtures("warm")
"""These runs have most of what they measure in common."""


@pytest.fixture(scope="module")
def done(trained, words, kept, tmp_path_factory):
    """A run that has ended."""
    model = copy.deepcopy(trained)
    before = state_of(model)
    out = tmp_path_factory.mktemp("run") / "out"
    found = sh.run(model, words, TEXTS, **TAKEN, out=out)
    assert_same(before, state_of(model))
    return found


@pytest.fixture
def generated(monkeypatch):
    """The calls by which a model generates, as a list that grows."""
    calls, plain = [], answers.generated
    monkeypatch.setattr(
        answers, "generated", lambda *args, **options: calls.append(1) or plain(*args, **options)
    )
    return calls


def reloaded(place):
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)


def spoken(model, words, whole):
    """How a model speaks beside the whole one, measured alone."""
    return sh.evaluate_speech(
        model, words, PROMPTS, whole=whole, num_tokens=FEW_WORDS, progress=False
    )


def assert_speech(found, expected):
    assert found.words == expected.words
    for way in WAYS:
        for name in MEASURES:
            first, second = found.scores[way][name].sums, expected.scores[way][name].sums
            assert first == pytest.approx(second, rel=1e-4, abs=1e-5), name


def test_every_state_speaks_as_if_measured_alone(done, learned, words):
    assert {*done.speech} == {"whole", "cut", "patched"}
    cut = copy.deepcopy(learned)
    sh.drop_layers(cut, done.recommended.plan.dropped)
    models = {"whole": learned, "cut": cut, "patched": reloaded(done.checkpoint)}
    for name, model in models.items():
        alone = spoken(model, words, learned)
        assert_speech(done.speech[name], alone)
    assert done.speech["whole"].mean("acceptance") == 1
    assert 0 < done.speech["cut"].mean("acceptance") < 1
    patched, bare = (done.speech[name].mean("divergence") for name in ("patched", "cut"))
    assert 0 < patched < bare


def test_samples_are_what_was_said_greedily_to_the_first_prompts(done, learned, words):
    assert len(done.continuations) == NUM_SAMPLES == len(PROMPTS) - 1
    texts = ["w5 w7 w11", "w1 w2", "w40 w41 w42 w43", "w9"]
    assert [one.prompt for one in done.continuations] == texts
    for one in done.continuations:
        for model, name in ((learned, "whole"), (reloaded(done.checkpoint), "patched")):
            given = words(one.prompt)["input_ids"]
            written = plain_answer(model, given, FEW_WORDS, ends=(2, 99)).written
            assert one.continued[name] == words.decode(written, skip_special_tokens=True)
        assert {*one.continued} == {"whole", "cut", "patched"}


def test_the_results_are_read_again(done):
    results = json.loads((done.out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["speech"]["patched"]["acceptance"] == done.speech["patched"].mean("acceptance")
    again = Run.load(done.out)
    assert again.continuations == done.continuations
    assert {name: one.to_record() for name, one in again.speech.items()} == {
        name: one.to_record() for name, one in done.speech.items()
    }
    (done.out.parent / "damaged").mkdir()
    for damage in ([], {"whole": {}}, {"whole": results["speech"]["whole"] | {"by_prompt": 3}}):
        place = done.out.parent / "damaged"
        (place / "results.json").write_text(json.dumps({**results, "speech": damage}))
        (place / "scan.safetensors").write_bytes((done.out / "scan.safetensors").read_bytes())
        with pytest.raises(sh.OutputError, match="is not of a run, or is damaged"):
            Run.load(place)


def test_a_plan_alone_has_the_speech_of_the_bare_cut(learned, words, tmp_path):
    only = sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out", plan_only=True)
    assert {*only.speech} == {"whole", "cut"}
    assert only.recommended.unpatched is None  # as was asked for, which is no warning
    assert all({*one.continued} == {"whole", "cut"} for one in only.continuations)


# Cut short, and gone on with.
def test_a_run_goes_on_and_nothing_is_said_twice(
    done, learned, words, tmp_path, monkeypatch, generated
):
    with monkeypatch.context() as patched:
        patched.setattr(RunStudy, "say_read", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out")
    assert Run.load(tmp_path / "out").speech.keys() == done.speech.keys()
    del generated[:]
    again = sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out")
    assert not generated
    for name, speech in done.speech.items():
        assert again.speech[name].to_record() == speech.to_record()
    assert again.continuations == done.continuations


def test_other_prompts_are_another_run(done, learned, words, tmp_path):
    options = {**TAKEN, "out": tmp_path / "out", "plan_only": True}
    sh.run(learned, words, TEXTS, **{**options, "prompts": ()})
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.run(learned, words, TEXTS, **options)


# Where nothing can be said.
@pytest.fixture
def short():
    """A model that has learned thirty positions."""
    config = GPT2Config(vocab_size=100, n_embd=16, n_layer=3, n_head=2, n_positions=30)
    return GPT2LMHeadModel(config).eval()


def test_prompts_of_our_own_that_do_not_fit_are_left_out(short, words, tmp_path):
    options = {**TAKEN, "n": 1, "plan_only": True, "out": tmp_path / "out"}
    with pytest.warns(UserWarning, match=r"no speech is measured: prompt \d+ with .* 30 positions"):
        done = sh.run(short, words, TEXTS[:40], **{**options, "prompts": None})
    assert done.speech == {}
    assert done.continuations == ()
    assert "How it speaks" not in [one.title for one in read_story(done.out, drawn=False).sections]


def test_given_prompts_that_do_not_fit_are_refused_before_the_scan(short, words, tmp_path):
    asked = {**TAKEN, "prompts": [*PROMPTS[:2], " ".join(25 * ["w3"])]}
    with pytest.raises(sh.TextsError, match="prompt 2 with an answer of 8 tokens has 33 tokens"):
        sh.run(short, words, TEXTS, **asked, out=tmp_path / "out")
    assert not (tmp_path / "out" / "scan.safetensors").exists()
