"""Criteria of experts compared: rows, regrets, the exhaustive oracle, the page."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import shallower as sh
from shallower.experts.criteria import CRITERIA
from shallower.judgement.criteria import experts
from shallower.judgement.judges import JUDGES
from shallower.models.experts import find_experts
from shallower.reporting.stories.comparison import comparison_story
from shallower.results.scores import Estimate
from shallower.studies.study import judged_items
from tests.conftest import mostly_slow, word_tokenizer
from tests.cutting.mixtures import mixture
from tests.judgement.test_judges import cut, margins
from tests.judgement.test_speech_judge import plain_divergences
from tests.studies.test_judging import said_to

LAST = 1

EXHAUSTIVE, LAYERS = "exhaustive", "layers"

UNTIMED = {"seconds": 0, "choice_seconds": 0}


def sparse(planted=()):
    """A mixture whose last layer alone has experts; the planted ones write nothing."""
    model = mixture("qwen3_moe", num_hidden_layers=LAST + 1, mlp_only_layers=list(range(LAST)))
    experts = find_experts(model)[0].module
    with torch.no_grad():
        for one in planted:
            experts.down_proj[one] = 0
    return model


def documents(start, count):
    return [" ".join(f"w{(start + i * j) % 90}" for j in range(1, 20)) for i in range(count)]


@pytest.fixture(scope="module")
def done():
    return sh.compare(
        sparse((1, 4)), word_tokenizer(), {"a": documents(1, 24), "b": documents(3, 24)},
        documents(7, 12), n=[2], unit="experts", num_choosing=4, cache=False, progress=False,
    )  # fmt: skip


def test_every_criterion_has_a_row_on_every_text(done):
    names = [*CRITERIA, EXHAUSTIVE, LAYERS]
    assert done.skipped == {}
    assert [(row.texts, row.criterion) for row in done.rows] == [
        (texts, name) for texts in ("a", "b") for name in names
    ]
    for row in done.rows:
        if row.criterion == LAYERS:
            assert row.experts is None
            assert row.dropped
        else:
            assert row.dropped == ()
            assert row.experts.startswith(f"{LAST}:")
        assert 0 < row.parameters_share < 1
    assert done.models[0].num_experts == 6


def with_regret(row, regret):
    """The row with another regret."""
    return replace(row, standing=replace(row.standing, regret=regret))


def test_words_tell_both_shares_of_parameters(done):
    """A layer holds more than the experts that go: nothing says that it is as much."""

    def story(best):
        rows = (with_regret(row, Estimate(float(row.criterion != best), 0.0)) for row in done.rows)
        return comparison_story(replace(done, rows=tuple(rows)), drawn=False)

    shares = {row.criterion: f"{100 * row.parameters_share:.1f} %" for row in done.rows}
    dropped = {len(row.dropped) for row in done.rows if row.criterion == LAYERS}
    assert shares["reap"] != shares[LAYERS]
    assert dropped == {1}
    layers = f"1 layer ({shares[LAYERS]} of the parameters)"
    experts = f"2 of 6 experts of every layer ({shares['reap']} of the parameters)"
    assert f"With {experts} or {layers} gone" in story("reap").sentence
    assert f"The best cut, of {experts}, has" in story("reap").cost
    assert f"The best cut, of {layers}, has" in story(LAYERS).cost
    assert story(LAYERS).strips[0].name.endswith("without 1 layer, by layers")


@pytest.mark.parametrize("name", ["ean", "man", "msan", "reap", "easy-ep"])
def test_what_writes_nothing_goes_first(done, name):
    rows = [row for row in done.rows if row.criterion == name]
    assert {row.experts for row in rows} == {f"{LAST}:1,4"}


def test_losses_and_regrets_are_those_of_all_sets(done):
    model, tokenizer = sparse((1, 4)), word_tokenizer()
    losses = {}
    for pair in itertools.combinations(range(6), 2):
        plan = sh.Plan(LAST + 1, (), experts=sh.DroppedExperts(6, {LAST: pair}))
        with sh.without_layers(model, plan):
            losses[f"{LAST}:{sh_text(pair)}"] = sh.evaluate_loss(model, tokenizer, documents(7, 12))
    rows = [row for row in done.rows if row.experts]
    for row in rows:
        assert row.standing.loss.mean == pytest.approx(losses[row.experts].nats, rel=1e-6)
    least = min(row.standing.loss.mean for row in done.rows)
    for row in rows:
        assert row.standing.regret.mean == pytest.approx(row.standing.loss.mean - least, abs=1e-9)


def sh_text(pair):
    first, second = pair
    return f"{first}:{second + 1}" if second == first + 1 else f"{first},{second}"


OPTIONS = [
    {"context": f"w{i} w{2 * i}", "options": [f"w{3 * i}", f"w{3 * i + 1}"], "answer": i % 2}
    for i in range(1, 17)
]
PROMPTS = [f"w{i} w{2 * i} w{3 * i}" for i in range(1, 9)]
UNITS = {"experts": ["frequency", "random", LAYERS], "layers": ["deepest", "random"]}


BESIDE = [
    ("loss", "experts", "disk"),
    ("kl", "experts", "memory"),
    ("options", "layers", "disk"),
    ("speech", "experts", "memory"),
    ("speech", "experts", "disk"),
]


def plain_score(judge, whole, without, tokenizer, *, held_out, items):
    """The mean score of a cut by float64 loops over what each of both models predicts."""
    if judge == "options":
        return -np.mean(margins(without, tokenizer, items))
    if judge == "speech":
        tokens = sum(len(one.written) for answers in items for one in answers)
        return sum(plain_divergences(whole, without, items)) / tokens
    nats, texts = 0.0, [tokenizer(text)["input_ids"] for text in held_out]
    for ids in texts:
        p, q = whole(ids), without(ids)
        for place in range(1, len(ids)):
            if judge == "loss":
                nats -= q[place - 1, ids[place]]
            else:
                nats += sum(np.exp(p[place - 1]) * (p[place - 1] - q[place - 1]))
    return nats / sum(len(ids) - 1 for ids in texts)


@pytest.mark.parametrize(
    ("judge", "unit", "place"),
    mostly_slow(itertools.product(JUDGES, UNITS, ["memory", "disk"]), BESIDE),
)
def test_every_judge_scores_every_cut_beside_the_whole_model(judge, unit, place, tmp_path):
    model, tokenizer, held_out = sparse((1, 4)), word_tokenizer(), documents(7, 3)
    given = {"speech": {"prompts": PROMPTS}, "options": {"options": tmp_path / "options.jsonl"}}
    given = given.get(judge, {})
    (tmp_path / "options.jsonl").write_text("\n".join(map(json.dumps, OPTIONS)))
    study = {
        "n": [3 if unit == "experts" else 1],
        "unit": unit,
        "criteria": UNITS[unit],
        "judge": judge,
        "num_choosing": 4,
    }
    study |= {"cache": False, "progress": False, **given}
    subject = model
    if place == "disk":
        sh.save_model(model, tokenizer, tmp_path / "model")
        subject, _ = sh.load_model(tmp_path / "model", "float32", "stream", progress=False)
    if place == "disk" and judge == "speech":
        with pytest.raises(sh.ModelError, match="leave out --stream, or the judge speech"):
            sh.compare(subject, tokenizer, documents(1, 24), held_out, **study)
        return
    done = sh.compare(subject, tokenizer, documents(1, 24), held_out, **study)
    items = judged_items(judge, seed=0, **given)[1]
    if judge == "speech":
        items = said_to(items, model, tokenizer)
    scores = []
    for row in (row for row in done.rows if row.state == "cut"):
        experts = row.experts and sh.DroppedExperts.of(6, row.experts)
        plan = sh.Plan(LAST + 1, (), experts=experts) if experts else row.dropped
        score = plain_score(
            judge, cut(model, ()), cut(model, plan), tokenizer, held_out=held_out, items=items
        )
        assert row.score.mean == pytest.approx(score, rel=1e-4, abs=1e-6)
        scores.append(score)
    assert max(scores) - min(scores) > 5e-4
    if judge in ("kl", "speech"):
        assert min(scores) > 5e-4


def test_bad_input_is_one_sentence(words):
    model, texts, held_out = sparse(), documents(1, 24), documents(7, 12)
    options = {"unit": "experts", "num_choosing": 4, "cache": False, "progress": False}
    with pytest.raises(sh.ExpertsError, match="cannot drop 6 of 6 experts a layer"):
        sh.compare(model, words, texts, held_out, n=[6], **options)
    with pytest.raises(sh.ExpertsError, match="unknown criterion of experts 'angular'"):
        sh.compare(model, words, texts, held_out, n=[1], criteria=["angular"], **options)
    with pytest.raises(sh.CriterionError, match="experts are compared by the losses of bare cuts"):
        sh.compare(model, words, texts, held_out, n=[1], speech=True, **options)
    done = sh.compare(model, words, texts, held_out, n=[5], criteria=["reap", LAYERS], **options)
    assert "keep at least 2" in done.skipped["reap, n = 5"]


def test_all_sets_are_tried_by_default_where_they_are_few(words, monkeypatch):
    monkeypatch.setattr(experts, "MOST_SETS", 14)
    texts, options = documents(1, 24), {"unit": "experts", "n": [1, 2], "num_choosing": 4}
    options |= {"cache": False, "progress": False}
    done = sh.compare(sparse((1, 4)), words, texts, documents(7, 12), **options)
    assert {row.n for row in done.rows if row.criterion == EXHAUSTIVE} == {1}
    assert done.skipped == {}
    options |= {"criteria": ["random", EXHAUSTIVE]}
    done = sh.compare(sparse((1, 4)), words, texts, documents(7, 12), **options)
    assert "at most 14 sets in all are tried" in done.skipped["exhaustive, n = 2"]


def test_the_criteria_are_listed(shallower):
    found = shallower("compare", "--list", "--unit", "experts", "--json")
    assert found.status == 0
    assert [one["name"] for one in found.json] == [*CRITERIA, EXHAUSTIVE, LAYERS]
    assert "one pass" in shallower("compare", "--list", "--unit", "experts").out
