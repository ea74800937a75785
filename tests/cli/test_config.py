"""``compare --config``: options from a file; several models, of which one is broken."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_shared_studies import without_time
from tests.folders import tree

ASKED = {
    "models": "[tiny, broken, deeper]",
    "texts": "[texts.jsonl, more.txt]",
    "eval-texts": "held_out.jsonl",
    "criteria": "[angular, deepest]",
    "n": "[1, 2]",
    "max_length": "16",
}


def written(text="", **more):
    """The command of a file of options in this folder, a key a line."""
    lines = [f"{key}: {value}\n" for key, value in {**ASKED, **more}.items()]
    Path("study.yaml").write_text(text or "".join(lines))
    return ("compare", "--config", "study.yaml")


@pytest.fixture
def here(folder, models, texts):
    """Two models, one whose weights are damaged, and texts."""
    for name in ("tiny", "deeper"):
        (folder / name).symlink_to(models / name)
    shutil.copytree(models / "tiny", folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"no weights")
    for name in ("texts.jsonl", "held_out.jsonl"):
        shutil.copy(texts / name, folder)
    lines = (texts / "texts.txt").read_text().splitlines()
    (folder / "more.txt").write_text("\n".join(f"w0 {line}" for line in lines))
    return folder


def test_a_file_is_the_options_and_the_command_line_has_the_last_word(here, shallower):
    said = shallower(*written(), "--dry-run", "--json").json
    words = "tiny broken deeper --texts texts.jsonl --texts more.txt --eval-texts held_out.jsonl"
    same = f"compare {words} --n 1,2 --criteria angular,deepest --max-length 16 --dry-run --json"
    expected = shallower(*same.split()).json
    of = ("compare", "texts", "n", "criteria", "states", "split")
    assert {name: said[name] for name in of} == {name: expected[name] for name in of}
    said = shallower(*written(stream="true"), "tiny", "--n", "3", "--dry-run", "--json").json
    assert (said["compare"], said["n"], said["criteria"]) == ("tiny", [3], "angular,deepest")
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modles: tiny", "study.yaml: there is no key modles: did you mean models?"),
        ("config: study.yaml", "study.yaml: there is no key config: expected of models, texts"),
        ("max_length: 8\nmax-length: 9", "study.yaml: the key max_length is there twice"),
        ("n: {a: 1}", "study.yaml: n: expected a value, or a list of values, got {'a': 1}"),
        ("texts:", "study.yaml: texts: expected a value, or a list of values, got None"),
        ("max_length: x", "study.yaml: max_length: got 'x': "),
        ("dtype: float8", "study.yaml: dtype: got 'float8': 'float8' is not one of 'auto'"),
        ("n: [1, x]", "cannot read '1,x': expected block sizes"),
        ("models: [tiny", "study.yaml, line 1: expected ',' or ']'"),
        ("models: " + "[" * 1000, "study.yaml cannot be read: maximum recursion"),
        ("only words", "study.yaml: expected options by their names, as n: [2, 4]"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_file_that_cannot_be_is_one_sentence_with_its_key(shallower, text, message):
    assert message in shallower(*written(text), "--out", "out").error
    assert not Path("out").exists()


def test_a_file_that_is_not_there_is_refused(folder, shallower):
    done = shallower("compare", "--config", "study.yaml")
    assert done.error.startswith("study.yaml cannot be read: no such file")
    assert tree(folder) == {}


@pytest.mark.usefixtures("here", "undrawn")
def test_a_judge_that_measures_nothing_takes_no_held_out_texts(shallower):
    written(models="[tiny, deeper]")
    lines = Path("study.yaml").read_text().replace("eval-texts: held_out.jsonl\n", "")
    done = shallower(*written(lines), "--judge", "none", "--out", "out", "--json")
    assert done.status == 0, done.err
    assert done.json["rows"] == []
    assert [model["whole"] for model in done.json["models"]] == [None, None]
    assert all(model["starts"].keys() == {"texts", "more"} for model in done.json["models"])
    assert len([*Path("out/scans").iterdir()]) == 4
    refused = shallower(*written(lines), "--out", "other").error
    assert "--eval-texts is missing: name a test set" in refused


@pytest.mark.usefixtures("here")
def test_one_broken_model_stops_no_other_and_is_named_at_the_end(shallower):
    asked = written(texts="texts.jsonl", n="1", states="cut")
    done = shallower(*asked, "--json")
    assert done.status == 1
    assert [model["num_layers"] for model in done.json["models"]] == [6, 8]
    assert {row["model"] for row in done.json["rows"]} == {"tiny", "deeper"}
    (failed,) = done.json["failures"].items()
    assert failed[0] == "broken"
    assert failed[1].startswith("cannot load broken: ")
    shown = shallower(*asked)
    assert shown.status == 1
    assert "broken" in shown.out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_comparison_of_many_is_killed_and_goes_on_and_a_model_is_mended(
    here, shallower, models, cache_folder
):
    """What one process finds at once is found by those that were killed, one after the other."""
    asked = written()
    out = here / "out" / "comparison.json"
    for ended in (signal.SIGKILL, signal.SIGINT):
        command = [sys.executable, "-m", "shallower", *asked, "--out", "out"]
        started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        before = len(rows_of(out))
        until = time.monotonic() + 300
        while len(rows_of(out)) <= before and time.monotonic() < until:
            assert started.poll() is None
            time.sleep(0.02)
        started.send_signal(ended)
        said = started.communicate()[1]
    assert said.endswith("interrupted: the same command goes on from what is done\n")
    partly = shallower(*asked, "--out", "out", "--json")
    assert partly.status == 1
    assert "resuming: " in partly.err
    assert [*partly.json["failures"]] == ["broken"]
    page = (here / "out" / "report.html").read_text()
    assert "broken" in page
    assert str(here) not in page
    for section in ("What each model bears", "Where the layers are alike", "Who chooses best"):
        assert section in page

    shutil.copy(models / "twin" / "model.safetensors", here / "broken")
    assert "exists already" in shallower(*asked, "--out", "out").error  # of other weights
    whole = shallower(*asked, "--out", "out", "--overwrite", "--json")
    assert whole.status == 0, whole.err
    assert len(whole.json["rows"]) == 3 * 2 * 2 * 2 * 2
    others = [row for row in whole.json["rows"] if row["model"] != "broken"]
    assert others == partly.json["rows"]  # with their seconds: nothing is measured again
    shutil.rmtree(cache_folder)
    anew = shallower(*asked, "--out", "anew", "--json")
    assert without_time(anew.json) == without_time(whole.json)
    before = numbers(here / "out")
    assert shallower("report", "out").status == 0
    assert numbers(here / "out") == before


def rows_of(place):
    """The rows of a comparison as far as it is written."""
    return json.loads(place.read_bytes())["rows"] if place.exists() else []


def numbers(folder):
    """The numbers of a page, and its sentence."""
    story = json.loads((folder / "report.json").read_bytes())
    return story["sentence"], story["facts"], story["data"]
