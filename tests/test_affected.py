"""`make affected` leaves out no test that the law connects with a change."""

import subprocess

import pytest

from tests import affected, house
from tests.conftest import ROOT

LAW = house.law((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))


def chosen(*names):
    return set(affected.affected(names)) - set(affected.HOUSE)


def test_a_room_runs_its_tests_and_those_of_all_that_may_import_it():
    last = "tests/cli"
    assert chosen("python/shallower/cli/run.py") == {last}
    assert {"tests/judgement", "tests/devices", "tests/studies", last} <= chosen(
        "python/shallower/judgement/trials.py"
    )
    assert not {"tests/values", "tests/patching"} & chosen("python/shallower/judgement/trials.py")
    assert "tests/cutting" not in chosen("python/shallower/scanning/scan.py")  # beside it
    upper = LAW[LAW.index(("values",)) :]
    everything = {place for floor in upper for room in floor for place in affected.tests_of(room)}
    assert everything <= chosen("python/shallower/values/plan.py")
    assert {"tests/test_errors.py", *everything} <= chosen("python/shallower/errors.py")


def test_every_room_and_every_folder_of_tests_is_known():
    rooms = {room for floor in affected.floors() for room in floor}
    assert rooms == {"devices", *(room for floor in LAW for room in floor)}
    with_tests = {file.parent for file in (ROOT / "tests").glob("*/test_*.py")}
    assert {folder.name for folder in with_tests} <= {*rooms, "docs"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tests/cli/test_scan.py", {"tests/cli/test_scan.py"}),
        ("tests/cutting/card_tools.py", {"tests/cutting"}),
        ("tests/documents.py", {"tests/cli"}),
        ("docs/how-to/run.md", set(affected.DOCS)),
        ("README.md", set(affected.DOCS)),
    ],
)
def test_a_file_beside_the_package_runs_what_reads_it(name, found):
    assert found <= chosen(name)
    assert "tests/values" not in chosen(name)


@pytest.mark.parametrize(
    "name",
    [
        "pyproject.toml", "Makefile", "rust/lib.rs", "tests/conftest.py",
        "tests/healing/conftest.py", "tests/rust/main.rs", "python/shallower/__init__.py",
        "python/shallower/gone/old.py",
    ],
)  # fmt: skip
def test_what_no_room_has_runs_all(name):
    assert affected.affected(["python/shallower/cli/run.py", name]) == ["tests"]


def test_changes_are_those_since_the_branch_left_the_other(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=A", "-c", "user.email=a@b", *words], cwd=tmp_path,
                       check=True, capture_output=True)  # fmt: skip

    def write(name):
        (tmp_path / name).write_text(name)
        git("add", name)
        git("commit", "--message", name)

    git("init", "--initial-branch", "main")
    write("first")
    git("checkout", "-b", "branch")
    write("committed")
    git("checkout", "main")
    write("theirs")
    git("checkout", "branch")
    (tmp_path / "first").write_text("edited")
    (tmp_path / "new").write_text("")
    assert affected.changed_since("main", tmp_path) == ["committed", "first", "new"]
