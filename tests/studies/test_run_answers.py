"""A run that patches and heals on what the whole model says, beside its texts."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest

import shallower as sh
from shallower.models.decoder import Decoder
from shallower.settings.studies import RunSettings
from shallower.store.given_models import InMemory
from shallower.store.store import open_store
from shallower.studies import recommending
from shallower.studies.answers import PATCH_ANSWERS, WantedAnswers
from shallower.studies.run import RunStudy
from shallower.texts.prompts import Prompt
from tests.documents import assert_same, state_of
from tests.families import random_model
from tests.healing.cuts import QUICK, documents
from tests.written import MANY as PROMPTS
from tests.written import write_prompts
from tests.written import written as written

TEXTS, REPORT = documents(90, 5), documents(12, 1)
TAKEN = {"eval_texts": REPORT, "max_length": 16, "top": 1, "n": 1, "prompts": ()}
HEAL = replace(QUICK, steps=4, share=0.25)
CHAT = {"messages": [{"role": "user", "content": "w1"}]}


pytestmark = pytest.mark.usefixtures("warm")
"""These runs have all in common up to their patch."""


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """Answers of eight tokens at most."""
    monkeypatch.setattr("shallower.studies.run.WantedAnswers", partial(WantedAnswers, num_tokens=8))


@pytest.fixture
def run(learned, words, tmp_path):
    def call(out="out", **options):
        return sh.run(learned, words, TEXTS, **{**TAKEN, **options}, out=tmp_path / out)

    return call


@pytest.fixture
def study(learned, words, tmp_path):
    """A run as a value, which is not carried out."""

    def made(**options):
        taken = {**TAKEN, **options}
        return RunStudy(
            models=(InMemory(learned, words),), texts=TEXTS, eval_texts=taken.pop("eval_texts"),
            settings=RunSettings.of(None, taken), out=tmp_path / "out", store=open_store(),
        )  # fmt: skip

    return made


def said_by(model, words):
    return sh.answer_prompts(model, words, PROMPTS, num_tokens=8)


def patched_on(monkeypatch):
    """What the patches of runs are fitted on from here on."""
    found, real = [], recommending.with_patch

    def watched(*args, **options):
        found.append(options)
        return real(*args, **options)

    monkeypatch.setattr(recommending, "with_patch", watched)
    return found


# The whole way
def test_it_is_patched_and_healed_on_what_the_whole_model_says(
    run, learned, words, tmp_path, written, monkeypatch
):
    before, patches = state_of(learned), patched_on(monkeypatch)
    done = run(answers=PROMPTS, share=0.25, heal=HEAL)
    assert_same(before, state_of(learned))
    assert written == [32, 8]
    said = said_by(learned, words)
    (patch,) = patches
    assert (patch["answers"], patch["share"]) == (said, 0.25)
    checkpoint = tmp_path / "out" / "checkpoint"
    assert json.loads((checkpoint / "shallower_patch.json").read_text())["share"] == 0.25
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    healing = results["healing"]
    assert healing["recipe"]["share"] == 0.25
    assert healing["answers"]["num_answers"] == 40
    assert healing["answers"]["num_tokens"] == sum(len(one.written) for one in said)
    assert done.recommended.healed.nats < done.recommended.cut.nats
    card = (tmp_path / "out" / "healed" / "README.md").read_text()
    assert "| answers | 40 answers of " in card
    assert "25 % of the texts answers" in card or "25 % of the sequences" in card
    del written[:]
    assert run(answers=PROMPTS, share=0.25, heal=HEAL).recommended == done.recommended
    assert written == []


@pytest.fixture
def chats(words):
    """The tokenizer with a template for chats, whose texts are short."""
    found = copy.deepcopy(words)
    found.chat_template = "{% for one in messages %}w1 {{ one.content[:9] }} w2{% endfor %}"
    return found


def test_a_model_that_chats_is_healed_on_answers_by_default(
    learned, chats, tmp_path, written, monkeypatch
):
    patches = patched_on(monkeypatch)
    taken = {**TAKEN, "n": 2, "heal": replace(HEAL, share=0.5, learning_rate=3e-3)}
    done = sh.run(learned, chats, TEXTS, **taken, out=tmp_path / "out")
    assert sum(written) == 32  # eight a step
    assert done.healing.answers.num_answers == len(patches[0]["answers"]) == 32


def test_answers_are_an_eighth_of_what_a_patch_is_given(learned, chats, tmp_path, written):
    done = sh.run(learned, chats, TEXTS, **{**TAKEN, "n": 2}, out=tmp_path / "out")
    fitted = done.splits["fit"] * 16  # tokens, at most
    assert 1 < sum(written) <= fitted / 8 / 8
    assert sum(written) < PATCH_ANSWERS


def test_by_default_a_model_without_room_is_asked_for_no_answers(chats):
    decoder, wanted = Decoder.of(random_model("opt")), WantedAnswers(None, 32, chats_only=True)
    with pytest.warns(UserWarning, match="no answers are learned from: prompt 0 with .* tokens"):
        assert wanted.of(decoder, chats) is None
    with pytest.raises(sh.TextsError, match="prompt 0 with an answer of 256 tokens has 261"):
        replace(wanted, chats_only=False).check(decoder, chats, ())
    few = replace(wanted, num_tokens=2)
    assert few.of(decoder, chats) is few


# What a run is known by
def test_other_answers_are_another_run(study, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", *PROMPTS)
    write_prompts(tmp_path / "more.jsonl", *PROMPTS, "w9")
    jobs = [
        study(**options).job
        for options in (
            {},
            {"answers": True},
            {"answers": PROMPTS},
            {"answers": tmp_path / "more.jsonl"},
            {"answers": PROMPTS, "share": 0.25},
            {"answers": PROMPTS, "seed": 1},
            {"heal": True, "heal_steps": 4},
            {"answers": False, "heal": True, "heal_steps": 4},
            {"answers": True, "heal": True, "heal_steps": 4},
            {"answers": True, "heal": True, "heal_steps": 400},
            {"answers": [{"prompt": one, "answer": "w1"} for one in PROMPTS]},
        )
    ]
    assert None not in jobs
    assert len({*jobs}) == len(jobs)
    assert study(answers=str(tmp_path / "prompts.jsonl")).job == jobs[2]
    assert study(answers=[Prompt(one) for one in PROMPTS]).job == jobs[2]
    nothing = study(answers=False)
    assert nothing.wanted_answers is study(answers=()).wanted_answers is None
    assert nothing.job == study(answers=()).job
    assert nothing.job not in jobs
    assert study(answers=None).job == jobs[0]
    healed = {"heal": True, "heal_steps": 4}
    for by_default in ({}, healed):
        assert study(**by_default).wanted_answers.chats_only
    assert study(answers=False, **healed).wanted_answers is None
    assert study(plan_only=True).wanted_answers is None


# Refusals
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"share": 0}, sh.RecipeError, "share must be above 0 and at most 1"),
        (
            {"answers": True, "heal": HEAL}, sh.RecipeError,
            "heal has a share of 0.25, and share is 0.5: name the one of both",
        ),
        ({"answers": 3}, sh.TextsError, r"be a file or a sequence, got int \(--answers\)"),
        ({"answers": [CHAT]}, sh.TextsError, "prompt 0 is a chat .* has no chat template"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)  # fmt: skip
def test_answers_that_cannot_be_are_refused_before_anything_is_written(
    run, tmp_path, options, error, message
):
    with pytest.raises(error, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()
