"""The commands `compare` and `curve`, which are one study with other defaults."""

import json

import pytest

import shallower as sh
from tests.cli.documents import tree

pytestmark = pytest.mark.usefixtures("warm")

KEYS = {
    "model", "criterion", "n", "state", "dropped", "loss", "stderr", "difference", "regret",
    "seconds", "layer_forwards",
}  # fmt: skip


@pytest.fixture
def asked(tiny, texts):
    """A comparison of two cheap criteria."""
    files = ["--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl"]
    return ["compare", tiny, *files, "--n", "1,2", "--criteria", "angular,deepest"]


def test_compare_prints_a_row_for_every_state_criterion_and_size(shallower, folder, asked):
    done = shallower(*asked, "--json")
    assert done.status == 0
    rows = done.json["rows"]
    assert [(row["state"], row["criterion"], row["n"]) for row in rows] == [
        (state, criterion, n)
        for state in ("cut", "patched")
        for criterion in ("angular", "deepest")
        for n in (1, 2)
    ]
    assert all(row.keys() >= KEYS for row in rows)
    assert done.json["whole"].keys() >= {"loss", "stderr"}
    assert rows[2]["dropped"] == [4]
    assert tree(folder) == {}


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


@pytest.mark.usefixtures("cold", "undrawn")
@pytest.mark.slow
def test_compare_says_what_was_measured_before(shallower, folder, asked):
    first = shallower(*asked, "--out", "out")
    assert "cached, measured" not in first.err + first.out
    again = shallower(*asked, "--out", "out")
    assert again.status == 0
    assert "cached, measured" in again.err + again.out
    assert "angular" in first.out
    assert "tie" in first.out
    for said in (first, again):
        assert said.out.endswith("wrote out\npage: out/report.html\n")
    for name in ("report.html", "report.json"):
        assert str(folder) not in (folder / "out" / name).read_text()
    assert (
        "shallower compare tiny \\\n    --texts texts.jsonl"
        in (folder / "out" / "report.html").read_text()
    )
    anew = shallower(*asked, "--no-cache", "--out", "other")
    assert anew.status == 0
    assert "cached, measured" not in anew.err + anew.out


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


def test_compare_judges_by_options(shallower, folder, asked):
    lines = [{"context": f"w{i}", "options": ["w1", "w2"], "answer": i % 2} for i in range(12)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--judge", "options", "--options", "items.jsonl"]
    done = shallower(*asked, *options, "--json")
    assert done.json["judge"] == "options"
    assert done.json["models"][0]["chance"] == 0.5
    del lines[3]["answer"]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    error = shallower(*asked, *options).error
    assert "line 4" in error
    assert "answer" in error


@pytest.mark.slow  # as sh.compare in tests/studies/test_judging.py
@pytest.mark.usefixtures("terse")
def test_compare_judges_by_the_words_of_the_whole_model(shallower, folder, asked):
    lines = [{"prompt": f"w{i} w{i + 1}"} for i in range(12)]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    speech = ["--judge", "speech", "--prompts", "asked.jsonl"]
    done = shallower(*asked, *speech, "--json")
    assert (done.json["judge"], done.json["splits"]["choose"]) == ("speech", 6)
    assert all(row["score"] > 0 for row in done.json["rows"] if row["state"] == "cut")
    beside = shallower(*asked, "--speech", "--prompts", "asked.jsonl", "--json")
    rows = beside.json["rows"]
    assert all(row["failed"] or row["speech"]["acceptance"] is not None for row in rows)
    assert not all(row["failed"] for row in rows)
    shown = shallower(*asked, *speech)
    assert "speech, the divergence from the whole model on its own words, nats a" in shown.out
    assert "divergence" in shown.out


def test_prompts_that_nobody_judges_by_are_refused(shallower, folder, asked):
    speech = ["--judge", "speech", "--prompts", "asked.jsonl"]
    lines = [*({"prompt": f"w{i} w{i + 1}"} for i in range(12)), {"prompt": " "}]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "line 13" in shallower(*asked, *speech).error
    refused = shallower(*asked, *speech[:2], "--stream").error
    assert "leave out --stream, or the judge speech" in refused


def test_a_dry_run_of_compare_loads_and_writes_nothing(shallower, folder, asked):
    done = shallower(*asked, "--out", "out", "--dry-run")
    assert done.status == 0
    assert "would write out" in done.out
    assert tree(folder) == {}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--criteria", "angular,cosine,angular"], "twice: angular"),
        (["--criteria", "angles"], "'angles'"),
        (["--judge", "options"], "--options"),
        (["--prompts", "x.jsonl"], "only the judge speech takes them, and"),
        (["--judge", "speech", "--prompts", "x.jsonl"], "no file of prompts x.jsonl"),
        (["--judge", "speech", "--options", "x.jsonl"], "no other judge takes one"),
        (["--n", "6"], "6"),
        (["--n=-1"], "cannot read '-1'"),
        (["--n", "0"], "expected sizes, as 1,2,4, got none"),
        (["--states", "mended"], "unknown state 'mended': expected some of cut, patched, healed"),
        (["--heal-steps", "3"], "--heal-steps without --states healed"),
        (["--patch-tokens", "0"], "'--patch-tokens'"),
        (["--seed", "-1"], "--seed"),
        (["--max-texts", "11"], "too few calibration and selection texts: 11"),
        (["--max-eval-texts", "1"], "too few test texts"),
    ],
)
def test_what_compare_cannot_do_is_one_sentence(shallower, folder, asked, more, named):
    for option in ((), ("--dry-run",)):
        assert named in shallower(*asked, *more, "--out", "out", *option).error
    assert tree(folder) == {}


def test_compare_needs_models_and_both_sets_of_texts(shallower, asked):
    assert "--texts" in shallower("compare", "model").error
    assert "--eval-texts" in shallower(*asked[:4]).error
    assert "model" in shallower("compare", *asked[2:]).error
