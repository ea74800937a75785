"""CONTRIBUTING.md: its diffs apply, and what they add works as that page says."""

import re
import shutil
import sys
from functools import cache
from itertools import count
from pathlib import Path

import pytest

import shallower
from tests.conftest import ROOT, tiny_llama, write_jsonl
from tests.documents import documents
from tests.forks import Fork

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
OPTION, CRITERION, MEASURE, STUDY = (
    "Add an option to `run`, `curve`, `compare`, `heal`, `scan`, `patch` or `eval`",
    "Add a criterion",
    "Add a measure to `eval`",
    "Add a study",
)


@cache
def diff(title):
    """The diff below a headline: for each file its lines, without what stands before them."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    files, found = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)[0].splitlines(), {}
    for line in files:
        if line.startswith(" # python/"):
            lines = found[line.removeprefix(" # python/")] = []
        else:
            lines.append(line)
    return found


def added(title):
    """The lines that a diff adds, of all files."""
    return [line for lines in diff(title).values() for line in lines if line[0] == "+"]


def apply(title, folder):
    """Carry out a diff in a copy of the package; what is behind nothing comes last."""
    for name, lines in diff(title).items():
        place = folder / name
        text = place.read_text(encoding="utf-8") if place.exists() else ""
        at = len(text)
        for sign, line in ((one[0], one[1:] + "\n") for one in lines):
            if sign == "+":
                text, at = text[:at] + line + text[at:], at + len(line)
                continue
            assert text.count("\n" + line) == 1, f"{name} has no {line}"
            at = text.index("\n" + line) + 1
            if sign == "-":
                text = text[:at] + text[at + len(line) :]
            else:
                at += len(line)
        place.write_text(text, encoding="utf-8")


def in_the_copy(code):
    """Run code with the package of this folder, and with the core that was imported before."""
    for name in [one for one in sys.modules if one.partition(".")[0] == "shallower"]:
        if name != "shallower._core":
            del sys.modules[name]
    sys.path.insert(0, str(Path.cwd()))
    exec(code, {})


@pytest.fixture(scope="module")
def copied(tmp_path_factory, words):
    """A function that runs Python with a copy of the package in which all diffs are applied."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(
        Path(shallower.__file__).parent,
        folder / "shallower",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for title in (OPTION, CRITERION, MEASURE, STUDY):
        apply(title, folder)
    place = folder / "shallower" / "judgement" / "criteria" / "similarity.py"
    text = place.read_text(encoding="utf-8")
    body = 'return shared_scan(subject).costs("angular")'
    place.write_text(text.replace("        ...\n", f"        {body}\n"), encoding="utf-8")
    tiny_llama(num_layers=4).save_pretrained(folder / "tiny")
    words.save_pretrained(folder / "tiny")
    write_jsonl(folder / "texts.jsonl", documents(24))
    write_jsonl(folder / "held.jsonl", documents(8, seed=1))

    numbers = count()

    def run(code):
        ran = Fork(in_the_copy, code, folder=folder, name=next(numbers))
        assert ran.ended() == 0, ran.err
        return ran.out

    return run


CALL = """
import json
from pathlib import Path
from shallower import cli, __file__
assert __file__.startswith(str(Path.cwd()))
def call(line):
    try:
        cli.main(line.split())
    except SystemExit as ended:
        assert not ended.code, line
"""


def test_an_option_is_one_field(copied):
    said = copied(
        CALL
        + """
import shallower as sh
call("run --help-all")
print(sh.RunSettings(drafts=2).to_json()["drafts"], sh.RunSettings(drafts=2).to_words())
try:
    sh.RunSettings.of(None, {"draft": 1})
except sh.SettingsError as error:
    print(error)
"""
    )
    assert len(added(OPTION)) == 1
    assert re.search(r"--top K .*?--drafts N +Samples of every prompt\.\s+\[default: 1", said, re.S)
    assert "2 ['--drafts', '2']" in said
    assert "did you mean drafts?" in said


def test_a_criterion_is_one_class(copied):
    command = "compare tiny --texts texts.jsonl --eval-texts held.jsonl --n 1 --criteria median"
    said = copied(CALL + f'call("compare --list")\nprint("=")\ncall("{command}")')
    listed, compared = said.split("=\n")
    assert re.search(r"^ median +Median angle between", listed, re.MULTILINE)
    assert re.search(r"^[ 0-9]*\bmedian ", compared, re.MULTILINE)


def test_a_measure_is_one_file(copied):
    command = "eval tiny --texts texts.jsonl --entropy texts.jsonl --drop 2 --dtype bfloat16"
    plain, *values = copied(
        CALL
        + f"""
call("{command}")
print("=")
import shallower.models.source
call("{command} --json")
print("=")
shallower.models.source.ModelSource.load = lambda *_, **__: 1 / 0
call("{command} --json")
print("=")
call("{command} --dry-run")
"""
    ).split("=\n")
    assert re.search(r"^all layers: entropy \d\.\d+ ± 0\.\d+$", plain, re.MULTILINE)
    assert re.search(r"^without \[2, 3\): entropy \d", plain, re.MULTILINE)
    assert values[0] == values[1]
    assert '"entropy": {' in values[0]
    assert "entropy: texts.jsonl" in values[2]
    assert next(iter(diff(MEASURE))) == "shallower/studies/entropy.py"
    assert len(added(MEASURE)) < 40


def test_a_study_is_below_sixty_lines(copied):
    said = copied(
        CALL
        + """
call("singles tiny --texts texts.jsonl --out out --max-length 16")
print("=", sorted(json.loads(Path("out/singles.json").read_text())))
call("singles --help-all")
"""
    )
    table, rest = said.split("= ")
    assert re.search(r"^ *3 +[+-]?\d", table, re.MULTILINE)
    assert "['0', '1', '2', '3', 'command', 'job']" in rest
    assert "--max-eval-texts N" in rest
    assert len(added(STUDY)) < 60
