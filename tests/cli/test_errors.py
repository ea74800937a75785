"""Errors in one sentence."""

import re
import shlex

import pytest

from tests.folders import tree


@pytest.fixture
def errors(folder, models, texts, scans, plans):
    """Files that are not what they should be, and where to find them."""
    places = {
        "tiny": models / "tiny",
        "texts": texts / "texts.jsonl",
        "scan": scans / "tiny",
        "plan": plans / "tiny",
        "other": plans / "deeper",
    }
    bad = folder / "bad"
    bad.mkdir()
    (bad / "file").write_text("in the way")
    (bad / "blank.txt").write_text(" \n\n")
    (bad / "folder.txt").mkdir()
    scan = (places["scan"] / "scan.safetensors").read_bytes()
    (bad / "truncated.safetensors").write_bytes(scan[: len(scan) // 2])
    plan = (places["plan"] / "shallower_plan.json").read_text()
    (bad / "plan.json").write_text(plan[: len(plan) // 2])
    for name in ("truncated", "tokenizer"):
        copied = bad / "models" / name
        copied.mkdir(parents=True)
        for file in places["tiny"].iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
    weights = bad / "models" / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (bad / "models" / "tokenizer" / "tokenizer.json").write_text("{}")
    return {**places, "bad": "bad"}


SCAN = "scan {tiny} --out out --texts "
ERRORS = [
    (SCAN + "{texts} --device-map nowhere", "nowhere"),
    (SCAN + "{texts} --gguf-file none.gguf", r"no file none\.gguf"),
    (SCAN + "{texts} --out {bad}/file/below", "bad/file is not a folder"),
    ("eval {tiny} --texts {texts} --out {bad}/file --dry-run", "bad/file is not a folder"),
    ("scan {bad}/models/truncated --texts {texts} --out out", "models/truncated"),
    ("scan {bad}/models/tokenizer --texts {texts} --out out", "models/tokenizer"),
    ("analyse {bad}/truncated.safetensors --out out", r"bad/truncated\.safetensors is truncated"),
    ("analyse {scan}/scan.safetensors --out out", "has no tensor hidden_states.*--tensor"),
    ("analyse {scan}/scan.safetensors --out out --tensor sums", "expected one of BF16"),
    ("plan {scan} --n 6", "n = 6 .*1 <= n <= 5"),
    ("plan {scan} --n 2 --metric taxicab", "taxicab"),
    ("prune {tiny} --drop 6 --out out", "no layer 6: its 6 layers are 0 .. 5"),
    ("prune {tiny} --plan {bad}/plan.json --out out", r"bad/plan\.json is not a plan"),
    ("prune {tiny} --drop 1 --out /proc/none/below", "/proc/none"),
    ("prune {tiny} --plan {other} --out out --dry-run", "plan .*tiny"),
    ("eval {tiny} --texts {texts} --plan {other}", "plan .*tiny"),
    (
        "prune {tiny} --plan none.json --out out",
        r"cannot read the plan none\.json: no such file or directory; name the file that "
        r"shallower plan wrote, or its folder",
    ),
    ("eval {tiny} --perplexity {bad}/blank.txt", r"there is no text in bad/blank\.txt"),
    (SCAN + "{bad}/folder.txt", r"bad/folder\.txt is a folder: expected a text file"),
    (
        SCAN + "{texts} --dtype fp16",
        "'--dtype': 'fp16' is not one of .*'int8'; did you mean float16",
    ),
    ("eval {tiny} --perplexity none.txt", r"text from none\.txt: no such file or directory$"),
]
"""Refused once the model, the scan or the texts are looked at: a stage, class and culprit a row.

What is refused earlier stands in test_early.py; every way for texts or layers to be wrong, in
tests/texts and tests/values.
"""


@pytest.mark.parametrize(("command", "message"), ERRORS, ids=[command for command, _ in ERRORS])
def test_an_error_is_one_sentence_and_nothing_is_written(
    shallower, folder, errors, command, message
):
    before = tree(folder)
    said = shallower(*shlex.split(command.format(**errors))).error
    assert re.search(message, said)
    assert "[Errno" not in said
    assert tree(folder) == before


def test_a_path_in_a_message_is_not_broken_over_lines(shallower, folder, tiny, jsonl, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = "/".join(["a folder with spaces in its name"] * 4)
    failed = shallower("scan", tiny, "--texts", f"{long}/none.txt", "--out", "out")
    assert f"error: there is no text file {long}/none.txt" in failed.err.splitlines()
    done = shallower("scan", tiny, "--texts", jsonl, "--out", long)
    assert f"wrote {long}/scan.safetensors" in done.out.splitlines()
    refused = shallower("scan", tiny, "--texts", jsonl, "--out", long, "--no-cache")
    assert f"{long}/scan.safetensors exists already" in refused.err


@pytest.mark.parametrize("name", ["[bold]a[/bold]", ":train:", "[/]", "ä 三"])
def test_a_name_in_a_message_is_as_it_was_given(shallower, name):
    assert shallower("plan", name, "--n", 1).error == f"there is no scan file {name}"
