"""Studies whose cuts are chosen by the divergence on the whole model's own words."""

import json

import numpy as np
import pytest

import shallower as sh
from shallower.errors import CriterionError, LayersError, TextsError
from shallower.evaluation.answers import write_answers
from shallower.models.decoder import Decoder
from shallower.models.source import ModelSource
from shallower.reporting.results import Run
from shallower.reporting.stories.run import run_story
from shallower.settings.studies import CompareSettings, RunSettings
from shallower.sharing.study_work import StudyWork
from shallower.store.store import open_store
from shallower.studies.compare import CompareStudy
from shallower.studies.run import RunStudy
from shallower.studies.study import items_fingerprint, judged_items
from shallower.texts.prompts import Prompt, prompt_ids
from shallower.texts.sources import Texts
from tests.conftest import tiny_llama, write_jsonl
from tests.documents import documents
from tests.healing.cuts import documents as progressions
from tests.judgement.test_judges import cut
from tests.judgement.test_speech_judge import plain_divergences
from tests.studies.conftest import FEW_WORDS

TEXTS, HELD_OUT = documents(24), documents(8, seed=1)
ASKED = [f"w{i} w{2 * i} w{3 * i}" for i in range(1, 9)]

CHEAP = {"n": [1], "criteria": ["exhaustive", "deepest"], "judge": "speech", "prompts": ASKED}
CALIBRATION, REPORT = progressions(60, 5), progressions(8, 1)
TAKEN = {"eval_texts": REPORT, "max_length": 16, "top": 2, "judge": "speech", "prompts": ASKED}


@pytest.fixture(scope="module")
def sharp():
    """A model far from uniform."""
    return tiny_llama(5, initializer_range=0.3)


def said_to(prompts, model, tokenizer, seed=0):
    """What a model says to prompts, greedily and drawn."""
    ids, decoder = prompt_ids(tokenizer, prompts), Decoder.of(model)
    ways = [
        write_answers(decoder, tokenizer, ids, num_tokens=FEW_WORDS, seed=s) for s in (None, seed)
    ]
    return [*zip(*ways, strict=True)]


def divergence(model, said, dropped):
    """Nats a token of a cut from the whole model, on what that has said."""
    sums = plain_divergences(cut(model, ()), cut(model, dropped), said)
    return sum(sums) / sum(len(one.written) for answers in said for one in answers)


# Comparisons.
def test_a_comparison_chooses_and_scores_on_the_words_of_the_whole_model(sharp, words):
    done = sh.compare(sharp, words, TEXTS, HELD_OUT, **CHEAP, cache=False)
    choosing, reporting = (
        said_to(half, sharp, words) for half in judged_items("speech", prompts=ASKED, seed=0)
    )
    by_layer = [divergence(sharp, choosing, [layer]) for layer in range(5)]
    best, deepest = (row for row in done.rows if row.state == "cut")
    assert best.dropped == (int(np.argmin(by_layer)),)
    assert (done.judge, done.unit) == ("speech", "nats a token")
    assert done.splits["choose"] == 4
    for row in (best, deepest):
        score = divergence(sharp, reporting, row.dropped)
        assert row.score.mean == pytest.approx(score, rel=1e-4)
        assert row.score.stderr > 0
        with sh.without_layers(sharp, row.dropped):
            loss = sh.evaluate_loss(sharp, words, HELD_OUT)
            assert row.standing.loss.mean == pytest.approx(loss.nats)
    least = min(best.score.mean, deepest.score.mean)
    assert [row.standing.regret.mean for row in (best, deepest)] == pytest.approx(
        [row.score.mean - least for row in (best, deepest)]
    )


def studies(folder, **options):
    settings = CompareSettings(**{**CHEAP, **options})
    return CompareStudy(
        models=[ModelSource(folder / "tiny", "float32")],
        texts={"texts": Texts(str(folder / "texts.jsonl"))},
        eval_texts=Texts(str(folder / "held_out.jsonl")),
        settings=settings, out=None, store=open_store(), progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, sharp, words):
    folder = tmp_path_factory.mktemp("judged")
    sharp.save_pretrained(folder / "tiny")
    words.save_pretrained(folder / "tiny")
    write_jsonl(folder / "texts.jsonl", TEXTS)
    write_jsonl(folder / "held_out.jsonl", HELD_OUT)
    lines = [json.dumps({"prompt": one}) + "\n" for one in ASKED]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "others.jsonl").write_text("".join([*lines[1:], '{"prompt": "w9 w9"}\n']))
    return folder


def test_prompts_and_seed_are_known_by_content_and_not_by_place(places, tmp_path):
    study = studies(places)
    (tmp_path / "same.jsonl").write_bytes((places / "prompts.jsonl").read_bytes())
    alike = [studies(places, prompts=one) for one in (places / "prompts.jsonl",
             str(tmp_path / "same.jsonl"), [Prompt(one) for one in ASKED])]  # fmt: skip
    assert {one.job for one in alike} == {study.job}
    others = [studies(places, **one) for one in ({"prompts": places / "others.jsonl"}, {"seed": 1},
              {"prompts": None}, {"judge": "kl", "prompts": None})]  # fmt: skip
    assert len({study.job, *(one.job for one in others)}) == 5
    assert study.again.endswith("--judge speech")
    assert alike[0].again.endswith("--judge speech --prompts prompts.jsonl")


def told(study):
    """A comparison as workers are told it."""
    return json.loads(json.dumps(StudyWork(study, on="ray").described()))


def test_workers_are_told_the_file_of_prompts(places):
    described = told(studies(places, prompts=places / "prompts.jsonl"))
    assert described["settings"]["prompts"] == str(places / "prompts.jsonl")


def test_halves_of_our_own_prompts_choose_and_report():
    choosing, reporting = judged_items("speech", seed=0)
    assert len(choosing) == len(reporting) == 60
    assert len({items_fingerprint("speech", [one]) for one in (*choosing, *reporting)}) == 120
    assert items_fingerprint("speech", judged_items("speech", seed=1)[0]) != items_fingerprint(
        "speech", choosing
    )


def test_a_prompt_that_is_there_twice_is_one():
    twice = [{"prompt": one, "answer": "so"} for one in ASKED] + ASKED
    assert sum(map(len, judged_items("speech", prompts=twice, seed=0))) == 8
    with pytest.raises(TextsError, match=r"too few prompts .*: 7 distinct, expected at least 8"):
        judged_items("speech", prompts=2 * ASKED[:7], seed=0)


@pytest.mark.parametrize(
    ("asked", "error", "named"),
    [
        ({"judge": "kl"}, CriterionError, "only the judge speech takes them, and .*--judge speech"),
        ({"prompts": ()}, TextsError, "no prompts"),
        ({"prompts": ASKED[:7]}, TextsError, "too few prompts for a selection and a test set: 7"),
    ],
)
def test_what_a_comparison_by_speech_cannot_do_is_one_sentence(sharp, words, asked, error, named):
    with pytest.raises(error, match=named):
        sh.compare(sharp, words, TEXTS, HELD_OUT, **{**CHEAP, **asked})


# Runs.
@pytest.fixture(scope="module")
def done(sharp, words, kept, tmp_path_factory):
    """A run whose proposals were raced by speech."""
    out = tmp_path_factory.mktemp("run") / "out"
    return sh.run(sharp, words, CALIBRATION, **TAKEN, out=out, n=2, plan_only=True)


def test_a_run_races_by_speech_and_reports_losses(done, sharp, words):
    recommended, verified = done.recommended, done.recommended.verified
    assert (verified.judge, verified.after, verified.num_items) == ("speech", "patch", 4)
    with sh.without_layers(sharp, recommended.plan.blocks):
        loss = sh.evaluate_loss(sharp, words, REPORT, max_length=16)
    assert recommended.cut.nats == pytest.approx(loss.nats, abs=1e-6)
    assert "nats a token of divergence from the whole model on its own" in verified.sentence()
    assert Run.load(done.out).recommended == recommended


def test_the_models_of_a_run_speak_on_prompts_that_have_not_chosen(done):
    settings = RunSettings(judge="speech", prompts=ASKED)
    given = {"models": (), "texts": CALIBRATION, "eval_texts": None, "out": None}
    study = RunStudy(**given, settings=settings)
    choosing, reporting = study.items
    assert study.prompts == reporting
    assert not {one.text for one in choosing} & {one.text for one in reporting}
    assert done.speech["cut"].num_prompts == len(reporting) == 4
    assert done.continuations[0].prompt == reporting[0].text
    own = RunStudy(**given, settings=RunSettings(judge="speech"))
    assert own.prompts == own.items[1][:24]
    assert len(own.items[0]) == 60
    quiet = RunStudy(**given, settings=RunSettings(judge="speech", prompts=()))
    assert quiet.prompts == ()
    assert quiet.items == own.items
    assert RunSettings(judge="speech").to_words() == ["--judge", "speech"]


def test_the_page_says_divergence_where_speech_has_raced(done):
    story = run_story(done)
    (table,) = (one for section in story.sections for one in section.tables
                if one.title.startswith("Proposals that came into"))  # fmt: skip
    assert table.head[2:4] == ("prompts", "divergence")
    assert "up to 4 selection prompts, in nats a token of divergence" in table.note
    drawn = {one.name: one for section in story.sections for one in section.drawings}
    assert drawn["proposals"].title == "What other proposals diverge more than the winner"
    facts = {fact.name: fact for section in story.sections for fact in section.facts}
    assert facts["judge"].value == (
        "speech, the divergence from the whole model on its own words, nats a token"
    )
    assert facts["selection prompts"].value.value == 4


@pytest.mark.parametrize(
    ("asked", "error", "named"),
    [
        ({"max_loss": 0.1}, LayersError, "max_loss beside the judge speech"),
        ({"judge": "kl"}, CriterionError, "unknown judge 'kl': a run races proposals by loss or"),
    ],
)
def test_what_a_run_by_speech_cannot_do_is_one_sentence(
    sharp, words, tmp_path, asked, error, named
):
    target = {} if "max_loss" in asked else {"n": 1}
    with pytest.raises(error, match=named):
        sh.run(sharp, words, CALIBRATION, **{**TAKEN, **target, **asked}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
