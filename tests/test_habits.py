"""One definition of clean: what people, pre-commit and CI call is a target of the Makefile."""

import re
import subprocess

import pytest
import yaml

from tests import house
from tests.conftest import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):.*?## \S", MAKEFILE, re.MULTILINE)


def called(text):
    """The targets that a text calls, as code or in a shell's line."""
    return re.findall(r"(?:`|^ {4}|exec )make ([a-z-]+)", text, re.MULTILINE)


def test_make_alone_prints_the_targets():
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    printed = [line.split()[0] for line in done.stdout.splitlines()]
    assert printed == TARGETS
    assert {"dev", "check", "test", "lint", "ci"} <= set(TARGETS)
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)[1]
    assert set(TARGETS) == set(phony.replace("\\\n", " ").split())


def test_ci_calls_make():
    assert called((ROOT / ".ci" / "run").read_text()) == ["ci"]
    recipe = re.search(r"^ci:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    prepared, checked = re.findall(r"^\t\$\(MAKE\) \$\(MAKEOVERRIDES\) (.*)", recipe, re.MULTILINE)
    assert "lint" in prepared.split()
    assert checked.split() == ["test"]
    for target in ("bench-check", "wheel"):
        assert f"else $(MAKE) $(MAKEOVERRIDES) {target};" in recipe


def test_the_benchmarks_are_checked_where_a_module_that_they_name_changes():
    """And every night."""
    show = ["make", "--no-print-directory", "--eval", "show: ; @echo $(BENCHED)", "show"]
    watched = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source = ROOT / "python" / "shallower"
    for file in (ROOT / "benches").glob("*.py"):
        for one in house.imports(source, file):
            name = one.name[1:].replace(".", "/")
            if one.name[0] == "." and name not in ("__init__", "_core"):
                assert f"python/shallower/{name}" in watched, f"{file.name} names {one.name}"
    assert {"benches", "rust", "Cargo.lock", "pyproject.toml"} <= set(watched.split())
    nightly = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())
    assert "bench-check" in nightly["jobs"]["tests"]["strategy"]["matrix"]["target"]


def test_pre_commit_calls_make():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    for hook in hooks:
        program, target, *_ = hook["entry"].split()
        assert (program, hook["language"]) == ("make", "system")
        assert target in TARGETS
    lint = re.search(r"^lint: (.*?) *##", MAKEFILE, re.MULTILINE)[1]
    assert set(lint.split()) <= {hook["id"] for hook in hooks}


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "benches/README.md"]
)
def test_targets_that_documents_name_are_there(name):
    named = set(called((ROOT / name).read_text(encoding="utf-8")))
    assert named <= set(TARGETS)
