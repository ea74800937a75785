"""What is of Unix or Linux alone has a way beside it, which is gone here on purpose."""

import json
import os
import subprocess
import sys
from hashlib import sha256

import pytest

from shallower import processes
from shallower.errors import OutputError
from shallower.storage import new_folder, resumable_file, resumable_folder
from tests import house
from tests.conftest import ROOT
from tests.folders import tree

SOURCE = ROOT / "python" / "shallower"
RECORDED = json.dumps({"files": {"a": sha256(b"1a").hexdigest()}}, indent=1).encode() + b"\n"
TORCH_FREE = [
    name
    for name in house.names_in(
        house.bullet((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), "no torch")
    )
    if name != "_core"
]


def python(*words):
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_modules_without_torch_are_imported_where_there_is_no_unix():
    names = [name.removesuffix(".__init__") for name in house.modules(SOURCE)]
    names = [name for name in names if house.under(name, TORCH_FREE)]
    assert {"storage", "cutting.rewriting", "store.store"} <= set(names)
    lines = [
        "import sys",
        "from tests.smoke import hide_unix",
        "hide_unix()",
        *(f"import shallower.{name}" for name in names),
        "print('fcntl' in dir(sys.modules['shallower.processes']), 'torch' in sys.modules)",
    ]
    assert python("-c", "\n".join(lines)).split() == ["True", "False"]


@pytest.mark.parametrize("words", [[], ["--without-unix"]], ids=["here", "elsewhere"])
def test_cuts_have_the_same_bytes_with_and_without_unix(words):
    assert "cuts are right" in python("-m", "tests.smoke", *words)


@pytest.fixture
def no_unix(monkeypatch):
    monkeypatch.setattr(processes, "fcntl", None)
    for name in ("O_DIRECTORY", "O_NOFOLLOW"):
        monkeypatch.delattr(os, name)


@pytest.mark.usefixtures("no_unix")
def test_one_at_a_time_writes_without_locks_of_unix(tmp_path):
    with resumable_folder(tmp_path / "new", "job") as folder:
        (folder / "a").write_bytes(b"a")
        with pytest.raises(OutputError, match="another process is writing it"):
            processes.check_alone(tmp_path / "new")
        for work in (new_folder(tmp_path / "new"), resumable_folder(tmp_path / "new", "job")):
            with pytest.raises(OutputError, match="another process is writing it"), work:
                pytest.fail("the body ran")
    processes.check_alone(tmp_path / "new")
    assert tree(tmp_path) == {"new": None, "new/a": b"a", "new/.shallower.json": RECORDED}
    with resumable_file(tmp_path / "file", "job") as folder:
        (folder / "file").write_bytes(b"b")
    assert tree(tmp_path) == {
        "new": None,
        "new/a": b"a",
        "new/.shallower.json": RECORDED,
        "file": b"b",
    }


@pytest.mark.usefixtures("no_unix")
def test_work_that_ends_early_goes_on_without_locks_of_unix(tmp_path):
    def interrupted():
        with resumable_folder(tmp_path / "new", "job") as folder:
            (folder / "a").write_bytes(b"a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with resumable_folder(tmp_path / "new", "job") as folder:
        assert tree(folder) == {"a": b"a"}
    assert tree(tmp_path) == {"new": None, "new/a": b"a", "new/.shallower.json": RECORDED}
