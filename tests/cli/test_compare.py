"""The commands `compare` and `curve`, which are one study with other defaults."""

import json

import pytest

import shallower as sh
from tests.folders import tree

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def asked(tiny, texts):
    """A comparison of two cheap criteria."""
    files = ["--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl"]
    return ["compare", tiny, *files, "--n", "1,2", "--criteria", "angular,deepest"]


def test_a_curve_leaves_a_comparison_and_says_it(shallower, folder, asked, monkeypatch):
    command = ["curve", *asked[1:], "--patch", "quick", "--out", "out"]
    done = shallower(*command, "--json")
    assert done.status == 0, done.err
    written = {"comparison.csv", "comparison.json", "report.html", "report.md"}
    assert {f"out/{name}" for name in written} < set(tree(folder))
    stored = json.loads(
        (folder / "out" / "comparison.json").read_text(), parse_constant=pytest.fail
    )
    beside = {name: stored.pop(name) for name in ("job", "command")}
    assert done.json == {**stored, "out": "out", "page": "out/report.html"}
    assert beside["command"].startswith("shallower curve ")
    curve = sh.CriteriaComparison.from_json(stored)
    assert [(row.n, row.state) for row in curve.rows if row.criterion == "deepest"] == [
        (1, "cut"), (2, "cut"), (1, "patched"), (2, "patched"),
    ]  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    again = shallower(*command)
    assert "cached, measured" in again.err
    assert max(map(len, again.out.splitlines())) <= 80
    before = tree(folder)
    assert "out/comparison.json exists already" in shallower(*command, "--seed", "1").error
    assert tree(folder) == before


@pytest.mark.slow
@pytest.mark.usefixtures("cold", "undrawn")
def test_a_comparison_that_was_cut_short_goes_on_in_its_folder(
    shallower, folder, asked, models, monkeypatch
):
    from shallower.store.store import Store

    command = [*asked, models / "deeper", "--out", "out"]
    with monkeypatch.context() as patched:
        patched.setattr(Store, "put", lambda *_arguments, **_options: None)
        assert shallower(*command).status == 0
    done = shallower(*command)
    assert done.status == 0, done.err
    part = shallower(*asked, "--out", "other")
    assert "results of this comparison: cached, measured" in part.err
    assert "exists already" in shallower(*asked, "--seed", "1", "--out", "out").error


def test_compare_lists_the_criteria(shallower):
    shown = shallower("compare", "--list").out
    rows = shallower("compare", "--list", "--json").json
    assert [row["name"] for row in rows] == [*sh.criteria, "best_plan", "recommended"]
    assert all(row["summary"].endswith(".") and row["cost"].endswith(".") for row in rows)
    assert all(name in shown for name in sh.criteria)


def test_compare_takes_calibration_texts_as_an_axis(shallower, asked, texts):
    done = shallower(*asked, "--texts", texts / "texts.txt", "--json")
    sources = {str(texts / "texts.jsonl"), str(texts / "texts.txt")}
    assert {row["texts"] for row in done.json["rows"]} == sources
    assert done.json["models"][0]["starts"].keys() == sources
    assert "named twice" in shallower(*asked, "--texts", texts / "texts.jsonl").error


def test_compare_needs_models_and_both_sets_of_texts(shallower, asked):
    assert "--texts" in shallower("compare", "model").error
    assert "--eval-texts" in shallower(*asked[:4]).error
    assert "model" in shallower("compare", *asked[2:]).error
