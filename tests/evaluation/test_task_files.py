"""The files that scores on tasks depend on."""

import pytest

from shallower.evaluation.task_files import files_in, files_of
from tests.evaluation.task_folders import CHOICE, choices, write_rows, write_tasks


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task, its rows and its code."""
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    write_rows(folder / "pick.jsonl", choices(4))
    (folder / "utils.py").write_text("import json, numpy, other\nfrom own_prompts import PRE\n")
    (folder / "other.py").write_text("import os\n")
    return folder


def test_own_modules_that_code_imports_are_among_them(tasks, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
    (tmp_path / "elsewhere" / "own_prompts.py").write_text("import deeper\nPRE = 'Q: '\n")
    (tmp_path / "elsewhere" / "deeper" / "__init__.py").write_text("")
    (tmp_path / "elsewhere" / "deeper" / "more.py").write_text("")
    found = [path.relative_to(tmp_path).as_posix() for path in files_in(tasks)]
    assert [name for name in found if not name.startswith("tasks/")] == [
        "elsewhere/own_prompts.py", "elsewhere/deeper/__init__.py", "elsewhere/deeper/more.py",
    ]  # fmt: skip
    assert {path.name for path in files_of(["pick"], tasks_dir=tasks)} >= {"more.py", "pick.jsonl"}


def test_code_that_imports_what_is_not_there_is_not_known(tasks):
    with pytest.raises(LookupError, match="own_prompts"):
        files_in(tasks)
    assert files_of(["pick"], tasks_dir=tasks) is None
