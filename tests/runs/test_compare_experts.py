"""Criteria of experts compared: rows, regrets, the exhaustive oracle, the page."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

import shallower as sh
from shallower.models.experts import find_experts
from shallower.reporting.stories.comparison import comparison_story
from shallower.runs import compare_experts
from shallower.scanning.expert_criteria import CRITERIA, EXHAUSTIVE, LAYERS
from tests.conftest import word_tokenizer
from tests.cutting.mixtures import mixture

LAST = 7


def sparse(planted=()):
    """A mixture whose last layer alone has experts; the planted ones write nothing."""
    model = mixture("qwen3_moe", mlp_only_layers=list(range(LAST)))
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
        documents(7, 12), n=[2], unit="experts", num_choosing=8, cache=False, progress=False,
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
            assert row.experts.startswith("7:")
        assert 0 < row.parameters_share < 1
    assert done.models[0].num_experts == 6


def test_words_tell_both_shares_of_parameters(done):
    """A layer holds more than the experts that go: nothing says that it is as much."""

    def story(best):
        rows = (replace(row, regret=float(row.criterion != best)) for row in done.rows)
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
    assert {row.experts for row in rows} == {"7:1,4"}


def test_losses_and_regrets_are_those_of_all_sets(done):
    model, tokenizer = sparse((1, 4)), word_tokenizer()
    losses = {}
    for pair in itertools.combinations(range(6), 2):
        plan = sh.Plan(8, (), experts=sh.DroppedExperts(6, {LAST: pair}))
        with sh.without_layers(model, plan):
            losses[f"7:{sh_text(pair)}"] = sh.evaluate_loss(model, tokenizer, documents(7, 12))
    rows = [row for row in done.rows if row.experts]
    for row in rows:
        assert row.loss == pytest.approx(losses[row.experts].nats, rel=1e-6)
    least = min(row.loss for row in done.rows)
    for row in rows:
        assert row.regret == pytest.approx(row.loss - least, abs=1e-9)


def sh_text(pair):
    first, second = pair
    return f"{first}:{second + 1}" if second == first + 1 else f"{first},{second}"


def test_bad_input_is_one_sentence(words):
    model, texts, held_out = sparse(), documents(1, 24), documents(7, 12)
    options = {"unit": "experts", "num_choosing": 8, "cache": False, "progress": False}
    with pytest.raises(sh.ExpertsError, match="cannot drop 6 of 6 experts a layer"):
        sh.compare(model, words, texts, held_out, n=[6], **options)
    with pytest.raises(sh.ExpertsError, match="unknown criterion of experts 'angular'"):
        sh.compare(model, words, texts, held_out, n=[1], criteria=["angular"], **options)
    with pytest.raises(sh.CriterionError, match="how a model speaks without experts"):
        sh.compare(model, words, texts, held_out, n=[1], speech=True, **options)
    done = sh.compare(model, words, texts, held_out, n=[5], criteria=["reap", LAYERS], **options)
    assert "keep at least 2" in done.skipped["reap, n = 5"]


def test_all_sets_are_tried_by_default_where_they_are_few(words, monkeypatch):
    monkeypatch.setattr(compare_experts, "MOST_SETS", 14)
    texts, options = documents(1, 24), {"unit": "experts", "n": [1, 2], "num_choosing": 8}
    options |= {"cache": False, "progress": False}
    done = sh.compare(sparse((1, 4)), words, texts, documents(7, 12), **options)
    assert {row.n for row in done.rows if row.criterion == EXHAUSTIVE} == {1}
    assert done.skipped == {}
    options |= {"criteria": ["random", EXHAUSTIVE]}
    done = sh.compare(sparse((1, 4)), words, texts, documents(7, 12), **options)
    assert "at most 14 sets in all are tried" in done.skipped["exhaustive, n = 2"]


def test_the_command_leaves_a_page(shallower, tmp_path):
    sh.save_model(sparse((1, 4)), word_tokenizer(), tmp_path / "model")
    for name, start, count in (("texts", 1, 24), ("held_out", 7, 12)):
        lines = [json.dumps({"text": text}) for text in documents(start, count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    found = shallower(
        "compare", tmp_path / "model", "--unit", "experts", "--n", "1,2", "--criteria",
        "reap,frequency,exhaustive,layers", "--texts", tmp_path / "texts.jsonl", "--eval-texts",
        tmp_path / "held_out.jsonl", "--dtype", "float32", "--out", out,
    )  # fmt: skip
    assert found.status == 0, found.err
    assert "With 2 of 6 experts of every layer gone" in found.out
    assert "Loss over the share of parameters" in (out / "report.html").read_text()
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [(row["n"], row["criterion"]) for row in rows][:2] == [(1, "reap"), (1, "frequency")]
    assert "7:1,4" in (out / "comparison.csv").read_text()


def test_the_criteria_are_listed(shallower):
    found = shallower("compare", "--list", "--unit", "experts", "--json")
    assert found.status == 0
    assert [one["name"] for one in found.json] == [*CRITERIA, EXHAUSTIVE, LAYERS]
    assert "one pass" in shallower("compare", "--list", "--unit", "experts").out
