"""The command `curve`."""

import json

import pytest

from shallower.values.curve import Curve
from tests.cli.documents import tree


@pytest.fixture
def asked(tiny, texts):
    """A curve of two cheap strategies."""
    files = ["--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl"]
    return [
        "curve", tiny, *files, "--n", "0,1,2", "--strategies", "similarity,deepest",
        "--quick-patch", "--out", "out",
    ]  # fmt: skip


def test_curve_leaves_a_curve_and_says_it(shallower, folder, asked, monkeypatch):
    done = shallower(*asked, "--json")
    assert done.status == 0, done.err
    written = {"curve.csv", "curve.json", "scan.safetensors", "report.html", "report.md"}
    assert {f"out/{name}" for name in written} < set(tree(folder))
    stored = json.loads((folder / "out" / "curve.json").read_text(), parse_constant=pytest.fail)
    beside = {name: stored.pop(name) for name in ("job", "command")}
    assert done.json == {**stored, "out": "out", "page": "out/report.html"}
    assert beside["command"].startswith("shallower curve ")
    curve = Curve.from_json(stored)
    assert [point.n for point in curve.points] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert curve.line("deepest", "cut")[1].dropped == (4,)
    monkeypatch.setenv("COLUMNS", "80")
    again = shallower(*asked)
    assert again.status == 0
    assert "cached, measured" in again.err
    assert max(map(len, again.out.splitlines())) <= 80
    for part in ("Layers less, as cut", "Layers less, after a quick patch", "wrote out"):
        assert part in again.out


@pytest.mark.slow
def test_another_curve_in_the_folder_needs_overwrite(shallower, folder, asked):
    assert shallower(*asked, "--states", "cut").status == 0
    before = tree(folder)
    assert "out/curve.json exists already" in shallower(*asked).error
    assert tree(folder) == before
    assert shallower(*asked, "--overwrite").status == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "9"], "n = 9 of 6 layers: expected 1 <= n <= 5"),
        (["--n", "-1"], "cannot read '-1': expected block sizes from 0 on"),
        (["--n", "0,x"], "cannot read '0,x'"),
        (["--strategies", "magic"], "unknown strategy 'magic': expected some of recommended, "),
        (["--states", "mended"], "unknown state 'mended': expected some of cut, patched, healed"),
        (["--heal-steps", "3"], "--heal-steps without --states healed"),
        (["--patch-tokens", "0"], "'--patch-tokens'"),
    ],
)
def test_what_cannot_be_is_one_sentence(shallower, folder, asked, options, message):
    assert message in shallower(*asked, *options).error
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done(shallower, folder, asked):
    shown = shallower(*asked, "--dry-run", "--json").json
    assert shown["n"] == [0, 1, 2]
    assert shown["strategies"] == "similarity, deepest"
    assert "would write out" in shallower(*asked, "--dry-run").out
    assert tree(folder) == {}
